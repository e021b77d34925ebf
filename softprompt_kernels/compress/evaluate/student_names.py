"""The students of an evaluation: the key in evaluation.json and the name in the table, in the order of the rows."""

STUDENT_NAMES = {
    "none": "no context",
    "truncated": "truncated context",
    "untrained": "untrained strided KV",
    "initial": "prompt before training",
    "prompt": "soft prompt",
}
