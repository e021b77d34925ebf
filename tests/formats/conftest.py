"""Fixtures of the tests of formats."""
