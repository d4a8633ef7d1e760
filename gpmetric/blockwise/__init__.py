"""A model run block by block, forward and backward, so that one block at a time is in memory."""
