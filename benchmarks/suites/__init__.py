"""The suites of `make bench`: attention, KL, scaling and the training step."""
