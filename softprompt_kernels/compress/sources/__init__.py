"""What a run reads: context, queries, self-study, chat format, model and tokenizer."""
