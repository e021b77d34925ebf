"""What an evaluation compares: the prompt, and the baselines that the model reads in its place."""

ROWS = (
    ("none", "nothing"),
    ("truncated", "truncated context"),
    ("untrained", "untrained strided KV"),
    ("initial", "prompt before training"),
    ("prompt", "soft prompt"),
)
"""What the model reads before the query, and how it is called in the table."""
