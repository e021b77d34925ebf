"""In this folder `precision` is the precision of attention."""

import pytest


@pytest.fixture
def precision(attention_precision):
    return attention_precision
