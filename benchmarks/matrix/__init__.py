"""folora on other versions of what it stands on: `make matrix`."""

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)
"""Whose versions are recorded."""
