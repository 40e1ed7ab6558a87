"""TRL's trainer with SAdam: arguments, callbacks, checkpoints, and what a training is given.

May import `metrics`, `adapters`, `optim` and all below them.
"""
