"""Suites of questions with known answers, made from a seed or read from public files."""
