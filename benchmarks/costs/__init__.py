"""A cost model on paper: bytes and FLOP of each stage of a run, for large models, long contexts and many GPUs."""
