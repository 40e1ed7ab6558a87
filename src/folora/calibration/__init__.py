"""What to keep: text that the base model generates, and the second moments of the layers' inputs.

May import `spectral`, `data` and `runtime`.
"""
