"""TRL's SFTTrainer with SAdam: arguments, callbacks, checkpoints; model, optimizer and data put together.

May import `metrics`, `adapters`, `optim` and all below them.
"""
