"""Many small fine-tunings of one encoder, as deltas of a mask that all of them share."""
