"""Hexdumps are those of hexdump -C, however the memory comes."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.effort import examples
from xenmapcache.cli import output
from xenmapcache.cli.hexdump import Hexdump

PIECES = st.sampled_from(
    [bytes(16), bytes(7), b"text and \x7f\x80\xff", b"\n\t", bytes(100), bytes(20000), b"x" * 40]
)


def expected(address: int, data: bytes, *, squeeze: bool) -> list[str]:
    """Return the lines, made one after the other."""
    lines: list[str] = []
    previous = None
    for position in range(0, len(data), 16):
        part = data[position : position + 16]
        if squeeze and part == previous:
            if lines[-1] != "*":
                lines.append("*")
            continue
        previous = part
        left, right = part[:8].hex(" "), part[8:].hex(" ")
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{address + position:08x}  {left:<23}  {right:<23}  |{text}|")
    return [*lines, f"{address + len(data):08x}"]


@settings(max_examples=examples(100), deadline=None)  # the machine may be busy
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 50000), max_size=4), st.booleans())
@example([bytes(16), bytes(16)], [16], True)
def test_lines_do_not_depend_on_chunks(pieces: list[bytes], cuts: list[int], squeeze: bool) -> None:
    """Lines that are cut by the edge of a chunk, and repeated ones, are those of the whole."""
    data = b"".join(pieces)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    dump = Hexdump(0xFFFFFF00, squeeze=squeeze)
    chunks = [data[low:high] for low, high in pairwise(edges)]
    blocks = chain.from_iterable(dump.blocks(memoryview(chunk)) for chunk in chunks)
    lines = [*chain.from_iterable(blocks), *dump.end()]
    assert lines == expected(0xFFFFFF00, data, squeeze=squeeze)


def test_several_lines_are_escaped_as_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A line stays one line, whatever is in it."""
    output.print_lines([])
    output.print_lines(["one", "t\tab"])
    output.print_lines(["esc\x1b", "two\nlines"])
    output.print_part("a\x1b\n\tb")
    assert capsys.readouterr().out == "one\nt\\tab\nesc\\x1b\ntwo\\nlines\na\\x1b\n\\tb"
