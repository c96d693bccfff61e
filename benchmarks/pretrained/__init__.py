"""What is a freeze worth where a model is pre-trained? See `python -m benchmarks.pretrained --help`."""
