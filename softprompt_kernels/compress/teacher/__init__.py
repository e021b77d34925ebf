"""The teacher, which is the model with the full context: its prefix, answers, hidden states and cached moments."""
