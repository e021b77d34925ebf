"""The tiny models of all families."""

from tests.models.conftest import build  # noqa: F401
