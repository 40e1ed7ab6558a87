"""The paper's experiments as recipes, for whoever has the GPU."""
