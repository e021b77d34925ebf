"""Training a compressor on many contexts, and reading a context with one, from the command line and from Python."""
