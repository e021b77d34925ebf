"""What limits a run, with the evidence: capacity, optimisation, objective, data, nothing to compress, template."""
