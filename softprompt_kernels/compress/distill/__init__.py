"""Training of the prompt end to end: the objective and the trainer."""
