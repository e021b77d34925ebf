"""A compressor that reads a context once: what the model computes for its summary tokens is the prompt."""
