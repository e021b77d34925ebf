"""Traces of an op in which each kernel has a name, and ranges for profilers that run outside the process."""
