"""LoRA adapters: layer selection, initialization, attaching, export and merging.

May import `calibration`, `spectral`, `data` and `runtime`.
"""
