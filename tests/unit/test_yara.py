"""GuestMemory.find_yara: strings of YARA's rules in guest memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from xenmapcache import (
    BackendUnavailableError,
    GuestMemory,
    MapCache,
    MockDomain,
    MockHypervisor,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, MiB

yara: Any = pytest.importorskip("yara", reason="yara-python is not installed")

HOLES = [(0x3000, PAGE_SIZE), (2 * MiB, 0x10000)]
END = 5 * MiB


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory=END, holes=HOLES)


@pytest.fixture
def memory(guest: MockDomain) -> Iterator[GuestMemory]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend, bucket_shift=16) as cache:
        yield GuestMemory(cache)


def rules(strings: str, condition: str = "any of them") -> Any:  # noqa: ANN401 - yara has no types
    return yara.compile(
        source=f"rule found : tag other {{ strings: {strings} condition: {condition} }}"
    )


def addresses(memory: GuestMemory, compiled: Any, **options: Any) -> list[int]:  # noqa: ANN401 - yara has no types
    return [each.address for each in memory.find_yara(compiled, **options)]


def test_what_a_match_says(memory: GuestMemory, guest: MockDomain) -> None:
    """Where it is, what was found, and by which string of which rule."""
    guest.write(0x1234, b"some evil text")
    (match,) = memory.find_yara(rules('$a = "evil" nocase $b = "good"'))
    assert match == (0x1234 + 5, b"evil", "found", "$a", ("tag", "other"))


def test_each_match_is_found_once(memory: GuestMemory, guest: MockDomain) -> None:
    """At and across the edges of chunks, pages, holes and of the memory."""
    edges = [0, MiB, MiB + 0x3000, 3 * MiB, 4 * MiB, 0x4000, 2 * MiB + 0x10000]
    places = sorted([*edges, *(at - 3 for at in (MiB, 3 * MiB)), *(4 * MiB - 6, END - 6, 0x2FFA)])
    places = [at for at in places if at != MiB and at != 3 * MiB]
    for at in places:
        guest.write(at, b"needle")
    assert addresses(memory, rules('$a = "needle"')) == places
    assert addresses(memory, rules("$a = /n[e]{2}dle/")) == places
    some = [at for at in places if 0x1000 <= at < 0x1000 + MiB]
    assert addresses(memory, rules('$a = "needle"'), address=0x1000, length=MiB + 3) == some


def test_matches_do_not_cross_a_hole(memory: GuestMemory, guest: MockDomain) -> None:
    """Text before a hole and after it is not one text."""
    guest.write(0x2FFD, b"nee")
    guest.write(0x4000, b"dle")
    assert addresses(memory, rules('$a = "needle" $b = /nee.{0,8}dle/s')) == []


@pytest.mark.parametrize("at", [MiB, 2 * MiB - 4, 0x4000, 2 * MiB + 0x10000, 3 * MiB])
def test_words_at_edges(memory: GuestMemory, guest: MockDomain, at: int) -> None:
    """What lies before a chunk decides whether a word begins there."""
    words = rules('$a = "word" fullword $b = /\\bword/')
    for start, _ in HOLES:
        guest.write(start - 1, b"s")  # which is not text before the range after the hole
    guest.write(at, b"word")
    assert addresses(memory, words) == [at, at]
    if at not in (0x4000, 2 * MiB + 0x10000):  # after a hole, nothing lies before it
        guest.write(at - 1, b"s")
        assert addresses(memory, words) == []


def test_long_matches(memory: GuestMemory, guest: MockDomain) -> None:
    """They are found whole over a chunk's edge, as long as `max_match`, with all of their bytes."""
    text = b"<" + b"x" * 0x2FFE + b">"
    guest.write(MiB - 0x1000, text)
    compiled = rules("$a = { 3C 78 78 [12282] 78 78 3E }")
    (match,) = memory.find_yara(compiled, max_match=0x3000)
    assert match[:2] == (MiB - 0x1000, text)


def test_a_condition_sees_one_chunk(memory: GuestMemory, guest: MockDomain) -> None:
    """Two strings in the same MiB are together, in others they are not."""
    both = rules('$a = "first" $b = "second"', "all of them")
    guest.write(0x100000, b"first")
    guest.write(0x180000, b"second")
    assert addresses(memory, both) == [0x100000, 0x180000]
    guest.write(0x180000, bytes(8))
    guest.write(0x210000, b"second")
    assert addresses(memory, both) == []


@pytest.mark.slow
def test_too_many_matches(
    memory: GuestMemory, guest: MockDomain, caplog: pytest.LogCaptureFixture
) -> None:
    """A WARNING says that some are left out, and where."""
    guest.write(3 * MiB, b"a" * (MiB + PAGE_SIZE))
    found = memory.find_yara(rules('$a = "a"'), 3 * MiB, MiB + PAGE_SIZE)
    assert sum(1 for _ in found) > 900_000
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("YARA leaves out matches in the MiB at 0x300000, too many: ")
    assert "'$a'" in message


def test_arguments(memory: GuestMemory) -> None:
    """Wrong ones are refused at once."""
    with pytest.raises(TypeError, match=r"rules must be what yara.compile\(\) returns, not 'x'"):
        memory.find_yara("x")
    with pytest.raises(ValueError, match="max_match must be at least 1, not 0"):
        memory.find_yara(rules('$a = "a"'), max_match=0)
    assert list(memory.find_yara(rules('$a = "a"'), 0, 0)) == []


def test_without_yara(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "yara", None)
    message = r"package yara-python is needed: pip install yara-python, or 'xenmapcache\[yara\]'"
    with pytest.raises(BackendUnavailableError, match=message):
        memory.find_yara(None)
