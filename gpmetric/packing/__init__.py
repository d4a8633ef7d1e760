"""Lossless archives of checkpoints, in which zeros take a bit."""
