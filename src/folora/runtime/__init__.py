"""Where and how folora runs: processes, devices, model loading, files, checkpoints, progress.

May import `folora.config` and `folora.errors`.
"""
