"""Training of the prompt end to end: where it starts, the objective and the trainer."""
