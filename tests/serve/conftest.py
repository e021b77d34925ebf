"""Fixtures of the tests of the endpoint."""
