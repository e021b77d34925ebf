"""A compressor that reads once: learned summary tokens behind a text, whose keys and values are its prompt."""
