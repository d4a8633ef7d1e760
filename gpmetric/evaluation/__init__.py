"""What a model is worth: perplexity on a text."""
