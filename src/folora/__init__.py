"""folora: fine-tune a foundation model and keep what it already knew (arXiv:2606.00132)."""
