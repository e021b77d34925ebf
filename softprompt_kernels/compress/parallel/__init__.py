"""One run on many processes, each with its own copy of the model: who they are, what they share out and exchange."""
