"""Ranks wait for each other by asking again and again: tests that start some run one after the other."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("ranks"))
