"""NumPy and RE2 find what Python's own means find, and are left out where they do not pay."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.effort import examples
from xenmapcache import GuestMemory, MapCache, MockHypervisor, open_backend
from xenmapcache.address import MiB
from xenmapcache.guest import automaton, printable
from xenmapcache.guest.printable import Encoding, Runs, printable_runs

EVERYTHING = 1 << 40
"""A size that is worth every import."""
SCRAPS = st.sampled_from([b"a", b"word", b"\t", b"~ ", b"\x7f", b"\xff", b"\0", b"\0\0", b"w\0i\0"])
TEXTS = st.lists(SCRAPS, max_size=40).map(b"".join)

# --- printable runs -----------------------------------------------------------------


@settings(
    max_examples=examples(100), deadline=None
)  # the first one may import, and the machine may be busy
@given(TEXTS, st.integers(1, 6), st.sampled_from(["ascii", "utf-16le"]), st.data())
@example(b"\xffa\0b\0\xffc\0d\0", 2, "utf-16le", None)
@example(b"\0a\tb\x7f ~\0", 1, "ascii", None)
def test_numpy_finds_the_runs_that_an_expression_finds(
    text: bytes, min_length: int, encoding: Encoding, data: st.DataObject | None
) -> None:
    """In any part of a text, for both encodings."""
    pytest.importorskip("numpy", reason="NumPy is not installed (pip: the extra fast)")
    start = data.draw(st.integers(0, len(text))) if data else 0
    end = data.draw(st.integers(start, len(text))) if data else len(text)
    quick = printable_runs(encoding, min_length, EVERYTHING)
    slow = printable_runs(encoding, min_length, 0)
    assert quick.lines_of is not None
    assert slow.lines_of is None
    firsts, stops = quick.find(bytearray(text), start, end)
    assert (list(firsts), list(stops)) == slow.find(bytearray(text), start, end)


@settings(
    max_examples=examples(100), deadline=None
)  # the first one may import, and the machine may be busy
@given(
    TEXTS,
    st.integers(0, 1 << 48),
    st.sampled_from(["ascii", "utf-16le"]),
)
@example(b"one\0two\0three", 0xFFFFFFFE, "ascii")
@example(b"o\0n\0e\0\0\0t\0w\0o\0", 0x123456789, "utf-16le")
def test_numpy_makes_the_lines_that_python_makes(
    text: bytes, base: int, encoding: Encoding
) -> None:
    """Where addresses get another digit, too."""
    pytest.importorskip("numpy", reason="NumPy is not installed (pip: the extra fast)")
    quick = printable_runs(encoding, 2, EVERYTHING)
    firsts, stops = quick.find(bytearray(text), 0, len(text))
    if len(firsts):
        runs = Runs(base, bytearray(text), firsts, stops, quick.character_bytes, quick.lines_of)
        expected = "".join(f"{address:#010x}  {each}\n" for address, each in runs.pairs())
        assert runs.lines() == expected
        assert runs._replace(lines_of=None).lines() == expected


def test_strings_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NumPy is not installed, and where there is too little memory for its import."""
    assert printable_runs("ascii", 4, 15 * MiB).lines_of is None
    monkeypatch.delitem(sys.modules, "xenmapcache.guest.vectors", raising=False)
    monkeypatch.delattr("xenmapcache.guest.vectors", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert printable_runs("ascii", 4, EVERYTHING).lines_of is None


@pytest.mark.parametrize("quick", [True, False])
def test_strings_across_parts(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that crosses the edge of a MiB is found once, and whole."""
    if quick:
        pytest.importorskip("numpy", reason="NumPy is not installed (pip: the extra fast)")
    monkeypatch.setattr(printable, "_WORTH_NUMPY_BYTES", 0 if quick else EVERYTHING)
    guest = MockHypervisor().create_domain(memory="4M")
    guest.write(MiB - 3, b"across the edge")
    guest.write(2 * MiB - 8, b"up to it")
    guest.write(2 * MiB, b"\xff" * 8 + b"after it")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        assert list(GuestMemory(cache).strings()) == [
            (MiB - 3, "across the edge"),
            (2 * MiB - 8, "up to it"),
            (2 * MiB + 8, "after it"),
        ]


# --- regular expressions ------------------------------------------------------------

ATOMS = st.sampled_from(
    [rb"a", rb"b", rb"1", rb" ", rb"\.", rb".", rb"[ab]", rb"[^a]", rb"[a-c\s.-]", rb"\d", rb"\w",
     rb"\s", rb"\S", rb"\W", rb"\x00", rb"\xff", rb"[\x80-\xff]", rb"\n", rb"[\]\\]", rb"-",
     rb"ab1"]
)  # fmt: skip
REPEATS = st.sampled_from(
    [b"", b"", b"*", b"+", b"?", b"*?", b"+?", b"??", b"{2}", b"{1,2}", b"{1,}?"]
)
EXPRESSIONS = st.recursive(
    st.lists(st.tuples(ATOMS, REPEATS).map(b"".join), min_size=1, max_size=4).map(b"".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(b"|".join),
        st.tuples(st.sampled_from([b"(%b)", b"(?:%b)"]), inner, REPEATS).map(
            lambda parts: parts[0] % parts[1] + parts[2]
        ),
        st.tuples(inner, inner).map(b"".join),
    ),
    max_leaves=4,
)
SUBJECTS = st.lists(st.sampled_from(list(b"ab1 .-A\n\0\xff\xe9\xc9\x0b]\\")), max_size=30).map(
    bytes
)


@settings(
    max_examples=examples(100), deadline=None
)  # the first one may import, and the machine may be busy
@given(EXPRESSIONS, SUBJECTS, st.sampled_from([0, re.IGNORECASE, re.DOTALL]), st.data())
@example(rb"(?:a|ab)(?:1|)", b"ab1 ab1", 0, None)
@example(rb"[a\s]\s", b"\x0b\x0b a", 0, None)
@example(rb"[b1]+ab1", b"bab1 1ab1 ab1", 0, None)
def test_re2_finds_what_python_finds(
    expression: bytes, text: bytes, flags: int, data: st.DataObject | None
) -> None:
    """All of it, in any part of a text, for every expression that goes to RE2."""
    pytest.importorskip("re2", reason="google-re2 is not installed (pip: the extra fast)")
    pattern = re.compile(expression, flags)
    search = automaton.searcher(pattern, EVERYTHING)
    if pattern.match(b"") or search is None:
        return
    start = data.draw(st.integers(0, len(text))) if data else 0
    end = data.draw(st.integers(start, len(text))) if data else len(text)
    expected = [match.span() for match in pattern.finditer(text, start, end)]
    assert list(search(bytearray(text), start, end)) == expected


@pytest.mark.parametrize(
    "expression",
    [rb"^a", rb"a$", rb"a\Z", rb"\ba", rb"(?=a)b", rb"(a)\1", rb"(?P<x>a)", rb"(?i:a)", rb"a{,3}b",
     rb"[[:alpha:]]", rb"[]a]", rb"a*+b", rb"(?>a)", rb"\0", rb"\101", b"\xe9", rb"[a\b]",
     rb"(?#x)a", b"a\n"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_what_engines_may_disagree_about_stays_with_python(expression: bytes) -> None:
    """Anchors, looks around, references, and what RE2 writes or reads in another way."""
    assert automaton.translate(re.compile(expression)) is None


@pytest.mark.parametrize("flags", [re.VERBOSE, re.MULTILINE, re.LOCALE])
def test_other_flags_stay_with_python(flags: re.RegexFlag) -> None:
    """They change what an expression means."""
    assert automaton.translate(re.compile(b"a b", flags)) is None


def test_case_of_bytes_beyond_ascii_stays_with_python() -> None:
    """RE2 takes 0xe9 and 0xc9 for one letter."""
    assert automaton.translate(re.compile(rb"\xe9", re.IGNORECASE)) is None
    assert automaton.translate(re.compile(rb"\xe9")) is not None


@pytest.mark.parametrize(
    ("expression", "literal"),
    [
        (rb"[A-Z][a-z]+ version", b" version"),
        (rb"[0-9]+\.exe\x00", b".exe\0"),
        (rb"\d+abcd*", b"abc"),
        (rb"\d+abc+", b""),
        (rb"\d+ab", b""),
        (rb"\d(?:abc)?\d", b""),
        (rb"\d(?:abc)\d", b""),
        (rb"\dabc|\ddef", b""),
        (rb"\d(?:abc|def)ghi", b"ghi"),
        (rb"first\d+longer text", b""),
    ],
)
def test_text_that_each_match_has(expression: bytes, literal: bytes) -> None:
    """It is looked for first, unless the expression begins with text, for which RE2 looks."""
    translation = automaton.translate(re.compile(expression))
    assert translation is not None
    assert translation.literal == literal
    insensitive = automaton.translate(re.compile(rb"\dabc", re.IGNORECASE))
    assert insensitive is not None
    assert insensitive.literal == b""


@pytest.mark.parametrize(
    ("expression", "matches_zero"),
    [
        (rb"[a-z]+\.\d", False),
        (rb"(?:a|b{2})", False),
        (rb"a\x00", True),
        (rb"a.b", True),
        (rb"[^a]", True),
        (rb"\W", True),
        (rb"[\x00-\x1f]", True),
    ],
)
def test_zeros_in_matches(expression: bytes, matches_zero: bool) -> None:
    """Pages of zeros are skipped if no match has a zero."""
    translation = automaton.translate(re.compile(expression))
    assert translation is not None
    assert translation.matches_zero is matches_zero


@settings(
    max_examples=examples(100), deadline=None
)  # the first one may import, and the machine may be busy
@given(
    st.lists(st.sampled_from([bytes(4096), bytes(100), b"a1b", b"x" * 5000]), max_size=6),
    st.integers(0, 9000),
    st.integers(0, 9000),
)
def test_pages_of_zeros_are_passed_over(pieces: list[bytes], start: int, short: int) -> None:
    """And nothing else: what lies between them is searched, whatever the part of the text."""
    text = bytearray().join(pieces)
    start, end = min(start, len(text)), max(0, len(text) - short)
    parts = list(automaton._without_zeros(text, start, end))
    assert all(low < high for low, high in parts)
    assert all(one[1] < other[0] for one, other in pairwise(parts))
    kept = {place for low, high in parts for place in range(low, high)}
    expected = {place for place in range(start, end) if text[place]}
    assert expected <= kept <= set(range(start, end))


def test_expressions_without_re2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is little memory, where RE2 is not installed, and for what it refuses."""
    pattern = re.compile(rb"[a-z]+x")
    assert automaton.searcher(pattern, 0) is None
    monkeypatch.setitem(sys.modules, "re2", None)
    assert automaton.searcher(pattern, EVERYTHING) is None
    monkeypatch.undo()
    pytest.importorskip("re2", reason="google-re2 is not installed (pip: the extra fast)")
    assert automaton.searcher(re.compile(rb"[a-z]{2000}"), EVERYTHING) is None


def test_many_matches_are_found_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a text with many of them; and RE2 has its turn again when they are few."""
    pytest.importorskip("re2", reason="google-re2 is not installed (pip: the extra fast)")
    monkeypatch.setattr(automaton, "_DENSE", 2)
    calls = []
    few = automaton._Automaton._few

    def counted(
        self: automaton._Automaton, text: bytearray, start: int, end: int
    ) -> Iterator[tuple[int, int]]:
        calls.append(text)
        return few(self, text, start, end)

    monkeypatch.setattr(automaton._Automaton, "_few", counted)
    search = automaton.searcher(re.compile(rb"[a-z]1"), EVERYTHING)
    assert search is not None
    for text, count, total in ((b"a1b1c1", 3, 1), (b"a1", 1, 1), (b"b1", 1, 2)):
        assert len(list(search(bytearray(text), 0, len(text)))) == count
        assert len(calls) == total


def test_a_candidate_that_python_rejects_is_passed_over() -> None:
    """Should RE2 ever see a match where Python sees none, the search continues after it."""

    class Everywhere:
        def search(self, text: bytearray, start: int, end: int) -> object:
            return Place(start) if start < end else None

    class Place:
        def __init__(self, place: int) -> None:
            self.start = lambda: place

    both = automaton._Automaton(
        re.compile(b"b."), Everywhere(), automaton.Translation(b"", b"", matches_zero=True)
    )
    assert list(both.spans(bytearray(b"aabcabbb"), 0, 8)) == [(2, 4), (5, 7)]


def test_find_with_re2_over_holes_and_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matches as Python's engine finds, across edges of parts and next to holes."""
    pytest.importorskip("re2", reason="google-re2 is not installed (pip: the extra fast)")
    guest = MockHypervisor().create_domain(memory="8M", holes=[(0x300000, 0x2000)])
    for address in (0, MiB - 4, 0x2FFFF8, 0x302000, 8 * MiB - 8):
        guest.write(address, b"x8 match")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        memory = GuestMemory(cache)
        found = list(memory.find(re.compile(rb"[a-z]\d match")))
        monkeypatch.setitem(sys.modules, "re2", None)
        assert found == list(memory.find(re.compile(rb"[a-z]\d match")))
        assert len(found) == 5
