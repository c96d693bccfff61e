"""Which code of the user reads gradients, weights or the optimizer's state."""
