"""The best pruned model at a budget: metric, allocation and update chosen together on validation text."""
