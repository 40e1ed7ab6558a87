"""Calibration: sample text from the base model and measure second moments of the layers' inputs.

May import `spectral`, `data` and `runtime`.
"""
