"""What was learned and what was retained: task loss, KL to the base model, update norms, lm-eval.

May import `adapters`, `optim` and all below them.
"""
