"""Many contexts at once: a bank of prompts over one frozen model."""
