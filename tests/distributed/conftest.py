"""The processes that a file's tests have started end with the file."""

import pytest

from . import ranks


@pytest.fixture(scope="module", autouse=True)
def _ended():
    """Each process group that a test makes leaves a thread of gloo's, which wakes up 100 times a second for ever."""
    yield
    ranks.stop_all()
