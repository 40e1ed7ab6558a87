"""LoRA adapters: which layers, how they are initialized, attached, exported and merged.

May import `calibration`, `spectral`, `data` and `runtime`.
"""
