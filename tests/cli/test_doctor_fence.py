"""The doctor and the memory fence that device models need on Arm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import pytest

from xenmapcache.arch import ARM64, Architecture
from xenmapcache.doctor import libraries
from xenmapcache.doctor.finding import Finding
from xenmapcache.errors import UnsupportedOperationError


def fence_found() -> list[Finding]:
    """Return what the doctor says of it."""
    return [each for each in libraries.check_libraries() if each.subject == "memory fence"]


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "host_architecture", lambda: ARM64)
    monkeypatch.setattr(libraries, "LIBRARIES", ())


@pytest.mark.usefixtures("arm")
@pytest.mark.parametrize(
    ("fence", "text"),
    [
        (partial(abs, 5), "of libatomic.so.1, for device models"),
        (int, "of the package's own code, for device models"),
    ],
)
def test_a_fence(fence: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where the fence comes from."""
    monkeypatch.setattr(libraries, "find_fence", lambda _: fence)
    assert fence_found() == [Finding("Libraries", "memory fence", "ok", text)]


@pytest.mark.usefixtures("arm")
def test_no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note, because a guest is mapped without it, and what to install."""

    def refuse(_: Architecture) -> NoReturn:
        raise UnsupportedOperationError("mmap failed")

    monkeypatch.setattr(libraries, "find_fence", refuse)
    remedy = "for device models: install libatomic.so.1 (Debian: apt install libatomic1)"
    expected = Finding("Libraries", "memory fence", "note", "none: mmap failed", remedy)
    assert fence_found() == [expected]


def test_x86_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of it."""
    monkeypatch.setattr(libraries, "LIBRARIES", ())
    monkeypatch.setattr(libraries, "find_fence", lambda _: None)
    assert fence_found() == []
