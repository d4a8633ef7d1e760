"""From a score to a pruned model: targets, masks, published metrics, OBS updates and the protocols around them."""
