"""Runs of printable characters, with NumPy: all bytes of a text in each step.

Import it only where NumPy is optional: it imports NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Positions = NDArray[np.intp]

_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


def finder(
    character_bytes: int, min_length: int
) -> Callable[[bytearray, int, int], tuple[Positions, Positions]]:
    """Return what finds runs of printable ASCII between two positions of a text.

    Args:
        character_bytes: 1, or 2: a character and a zero.
        min_length: of a run, in characters.
    """

    def find(text: bytearray, start: int, end: int) -> tuple[Positions, Positions]:
        data = np.frombuffer(text, np.uint8)[start:end]
        # Space to tilde: in numbers without a sign, what is below the space is above them.
        printable = ((data - 32) < 95) | (data == 9)
        if character_bytes == 1:
            firsts, stops = _runs(printable, min_length)
        else:
            pairs = printable[:-1] & (data[1:] == 0)
            # Of two characters a byte apart, one would be a zero: these runs do not overlap.
            even, odd = (_runs(pairs[phase::2], min_length) for phase in (0, 1))
            firsts, stops = (
                np.sort(np.concatenate((2 * one, 2 * other + 1)))
                for one, other in zip(even, odd, strict=True)
            )
        return firsts + start, stops + start

    return find


def _runs(flags: NDArray[np.bool_], min_length: int) -> tuple[Positions, Positions]:
    """Return where runs of true flags begin and end that have at least some length."""
    known = 1  # `begins` tells where this number of true flags follow each other
    begins = flags
    while known < min_length and len(begins):
        step = min(known, min_length - known)
        begins = begins[: max(0, len(begins) - step)] & begins[step:]
        known += step
    framed = np.zeros(len(begins) + 2, np.bool_)
    framed[1:-1] = begins
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    return edges[0::2], edges[1::2] + (min_length - 1)


def lines(
    base: int, text: bytearray, firsts: Positions, stops: Positions, character_bytes: int
) -> str:
    """Return a line for each run, with its address; see :meth:`.Runs.lines`.

    Args:
        base: the address of the text. All addresses have the same number of digits.
        text: where the runs are.
        firsts: where runs begin in the text; at least one.
        stops: where they end.
        character_bytes: of each character.
    """
    lengths = (stops - firsts) // character_bytes
    ends = np.cumsum(lengths)
    data = np.frombuffer(text, np.uint8)
    places = np.repeat(firsts - character_bytes * (ends - lengths), lengths)
    characters = data[places + character_bytes * np.arange(ends[-1])]
    # A line end and an address before each text; the first line end is cut off, the last added.
    digits = len(f"{base + int(firsts[0]):08x}")
    heads = np.empty((len(firsts), digits + 5), np.uint8)
    heads[:] = np.frombuffer(b"\n0x" + bytes(digits) + b"  ", np.uint8)
    addresses = firsts.astype(np.uint64) + np.uint64(base)
    for digit in range(digits):
        shift = np.uint64(4 * (digits - 1 - digit))
        heads[:, 3 + digit] = _DIGITS[(addresses >> shift) & np.uint64(15)]
    sizes = np.empty(2 * len(firsts), np.intp)
    sizes[0::2], sizes[1::2] = digits + 5, lengths
    is_text = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
    everything = np.empty(len(is_text), np.uint8)
    everything[is_text] = characters
    everything[~is_text] = heads.ravel()
    return everything[1:].tobytes().decode("ascii") + "\n"
