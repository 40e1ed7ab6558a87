"""What folora costs beside plain LoRA, in seconds and in bytes; see `benchmarks.speed.__main__`."""
