"""Compress a long context into a soft prompt."""
