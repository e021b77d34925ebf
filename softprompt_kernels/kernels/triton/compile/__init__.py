"""Compilation without a GPU: every shipped configuration, its machine code and its occupancy."""
