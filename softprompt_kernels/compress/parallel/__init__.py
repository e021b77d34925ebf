"""One run on many processes: ranks, and what they exchange."""
