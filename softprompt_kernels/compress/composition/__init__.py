"""Prompts of several contexts, joined to one, and trained a little."""
