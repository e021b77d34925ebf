"""The causes, one a file: from the evidence of a run to a finding, or None. Pure functions, with their thresholds."""
