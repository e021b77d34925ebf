"""The measuring tools: comparisons of implementations, timing, peak memory, the machine, requirements, the report."""
