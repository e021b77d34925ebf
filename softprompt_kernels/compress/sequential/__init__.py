"""Long contexts, segment by segment: the state of the reading is a prompt."""
