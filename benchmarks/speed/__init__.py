"""Time and memory of folora compared with LoRA; see `benchmarks.speed.__main__`."""
