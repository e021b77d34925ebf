"""Recipes: the package in other people's trainers, one a file."""
