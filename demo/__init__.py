"""Data for the demo: what a model should keep, and a made-up task for it to learn."""
