"""The model with the full context: its answers, hidden states, and the cache of its moments."""
