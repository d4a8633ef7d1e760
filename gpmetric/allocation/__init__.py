"""Per-layer sparsity: levels of removal, a search of the front between sparsity and loss, named allocators."""
