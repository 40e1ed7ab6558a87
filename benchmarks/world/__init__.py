"""A small world whose whole language is known, and a small model pretrained on it.

Knowing every kept skill exactly lets forgetting be measured with many seeds in seconds.
"""
