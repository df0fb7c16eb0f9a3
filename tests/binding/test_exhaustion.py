"""Where ctypes cannot convert an argument, callers see MemoryError or RecursionError."""

from __future__ import annotations

import ctypes

import pytest

from xenmapcache.binding import collector
from xenmapcache.binding.ctypes_loader import cause_of
from xenmapcache.binding.declarations import LIBC
from xenmapcache.binding.loader import get_loader


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
def test_ctypes_hides_the_cause_in_its_message(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Its own exception is caught by no caller."""

    def fail(_: object) -> None:
        raise ctypes.ArgumentError(f"argument 1: {kind.__name__}: ")

    monkeypatch.setattr(collector, "_untrack", fail)
    with pytest.raises(kind):
        collector.untrack([])


def test_a_wrong_argument_stays_an_argument_error() -> None:
    """It is a bug of the caller."""
    error = ctypes.ArgumentError("argument 1: TypeError: wrong type")
    assert cause_of(error) is error


class Unconvertible:
    """A number, as far as its size is checked, whose conversion fails."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __le__(self, other: int) -> bool:
        return True

    def __ge__(self, other: int) -> bool:
        return True

    @property
    def _as_parameter_(self) -> int:
        raise self.kind


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
def test_a_call_whose_argument_cannot_be_converted(kind: type[Exception]) -> None:
    """The call is not made, and its caller sees the cause."""
    madvise = get_loader("ctypes").open(LIBC, "")["madvise"]
    with pytest.raises(kind, match="could not convert an argument"):
        madvise(None, Unconvertible(kind), 0)
