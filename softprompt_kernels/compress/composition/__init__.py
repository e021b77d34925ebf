"""Prompts of several contexts, joined to one."""
