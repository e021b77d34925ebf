"""The inputs of a run one by one: queries, self-study, chat format, token sequences, model and tokenizer."""
