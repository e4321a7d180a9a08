"""Which tensors, and which share of each, are worth training under a budget."""
