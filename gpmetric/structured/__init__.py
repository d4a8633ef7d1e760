"""Structured pruning: whole heads, channels and layers removed, chosen by a policy gradient without gradients."""
