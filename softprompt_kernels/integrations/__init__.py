"""The package's attention in models of transformers and PEFT, by one line."""
