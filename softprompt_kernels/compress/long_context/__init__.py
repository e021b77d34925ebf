"""Where the keys and values of a long context are kept, and what memory the stages take."""
