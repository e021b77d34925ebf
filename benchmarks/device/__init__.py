"""`make gpu`: times on a CUDA device."""
