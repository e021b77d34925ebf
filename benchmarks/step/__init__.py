"""A whole training step, for the suite `step`: implementations, their memory, a profile and a floor."""
