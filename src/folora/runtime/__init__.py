"""Runtime support: processes, devices, model loading, atomic files, checkpoints, progress, signals.

May import `folora.config` and `folora.errors`.
"""
