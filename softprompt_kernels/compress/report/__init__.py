"""The results of a run for people: the table and the training curves."""
