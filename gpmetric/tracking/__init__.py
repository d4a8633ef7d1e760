"""Trackers: what a command tells while it runs, kept where others look at it."""
