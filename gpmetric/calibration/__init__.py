"""Statistics of a model on unlabelled text: the operands a metric is made of."""
