"""Questions of what a model knows, for lm-evaluation-harness, from data on disk."""
