"""Times and memory of the ops and of other packages in one run, and the comparison of two runs."""
