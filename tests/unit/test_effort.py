"""Limits of work hold where they should: the tests' own yardstick."""

from __future__ import annotations

import sys

import pytest

from tests.effort import calls_at_most


def test_too_much_work_is_ended() -> None:
    """A block is stopped at its limit, even one that would never end."""
    done: list[int] = []
    with pytest.raises(AssertionError, match="more than 100 calls"), calls_at_most(100):
        while True:
            done.append(1)
    assert 90 < len(done) <= 100
    assert sys.getprofile() is None


def test_too_much_work_cannot_be_hidden() -> None:
    """Code that swallows every exception is found out at the end of the block."""
    with pytest.raises(AssertionError, match="kept quiet"), calls_at_most(10):
        try:
            for _ in range(20):
                len("")
        except AssertionError:
            pass


def test_enough_is_allowed() -> None:
    """What stays within the limit is left alone."""
    with calls_at_most(30):
        assert sum(map(len, ["ab"] * 1000)) == 2000
