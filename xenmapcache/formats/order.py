"""Whether frame numbers ascend, found out quickly."""

from __future__ import annotations

import operator
from array import array
from itertools import islice

_BLOCK = 1 << 12


def is_ascending(numbers: array[int]) -> bool:
    """Tell whether numbers are strictly ascending; quickly where many are consecutive."""
    total, position, template = len(numbers), 0, _Consecutive()
    while position < total - 1:
        first = numbers[position]
        room = min(_BLOCK - first % _BLOCK, total - position)
        for size in (room, min(room, 512), min(room, 64)):
            if numbers[position + size - 1] - first == size - 1:
                if numbers[position : position + size] != template.numbers(first, size):
                    return False
                break
        else:
            size = min(64, total - position)
            some = numbers[position : position + size]
            if not all(map(operator.lt, some, islice(some, 1, None))):
                return False
        position += size
        if position < total and numbers[position] <= numbers[position - 1]:
            return False
    return True


class _Consecutive:
    """Arrays of consecutive numbers, made from their octets: faster than a range by far."""

    def __init__(self) -> None:
        self._octets = bytearray(8 * _BLOCK)
        self._octets[0::8] = bytes(range(256)) * (_BLOCK >> 8)
        self._first = bytes(8)  # the octets of the block's first number
        self._block = -1
        self._numbers = array("Q")

    def numbers(self, first: int, count: int) -> array[int]:
        """Return ``count`` numbers from ``first`` on, which do not cross a multiple of _BLOCK."""
        block, start = divmod(first, _BLOCK)
        if block != self._block:
            octets = (block * _BLOCK).to_bytes(8, "little")
            if octets[1] != self._first[1] or self._block < 0:
                parts = (bytes([octets[1] + high]) * 256 for high in range(_BLOCK >> 8))
                self._octets[1::8] = b"".join(parts)
            for position in range(2, 8):
                if octets[position] != self._first[position]:
                    self._octets[position::8] = bytes([octets[position]]) * _BLOCK
            self._block, self._first = block, octets
            self._numbers = array("Q", self._octets)
        return self._numbers[start : start + count]
