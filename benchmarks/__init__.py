"""Measurements of folora; nothing in the library imports them."""
