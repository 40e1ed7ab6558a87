"""Comparisons on pretrained models and real data."""
