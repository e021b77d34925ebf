"""Compilation without a GPU: every shipped configuration, its machine code, occupancy and tuning."""
