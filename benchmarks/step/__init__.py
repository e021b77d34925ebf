"""A whole training step: implementations, memory, profile and floor."""
