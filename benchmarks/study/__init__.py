"""The study of `make study`: ways to make a KV prompt, and how much each recovers at which ratio, in which time."""
