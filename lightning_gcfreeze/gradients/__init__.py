"""Gradients of single samples, by capture or by replay, and of the batch."""
