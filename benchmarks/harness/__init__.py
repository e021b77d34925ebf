"""Comparisons of implementations: cases, timing, memory, the machine, requirements and the report."""
