"""Structured pruning: whole heads, channels and layers removed, chosen by measuring smaller models."""
