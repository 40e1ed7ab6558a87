"""One process against several, on gloo; see `benchmarks.distributed.__main__`."""
