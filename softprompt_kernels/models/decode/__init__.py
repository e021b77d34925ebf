"""Decoding many sequences together: the batch, the cache of its rows, and the choice of the next token."""
