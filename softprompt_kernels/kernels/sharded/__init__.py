"""Losses of a head whose vocabulary is split over the ranks of a process group (vocabulary parallelism).

Each rank holds consecutive rows of the weight, in the order of the ranks. Hidden states are the same on every rank, and
so are the results.
"""
