"""Memory and time of the stages whose cost grows with the context (`python -m benchmarks.long_context`)."""
