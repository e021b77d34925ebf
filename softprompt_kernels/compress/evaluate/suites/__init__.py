"""Suites: a context with questions and their right answers, made from a seed or read from the files of benchmarks."""
