"""The order of loads, stores and fences: emulation cannot show a fence that is missing."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from xenmapcache import ioreq
from xenmapcache.ioreq import BufferedRing, Request, RequestKind, RequestSlot

ACCESSES = ("unpack_from", "pack_into")
NAMES = {
    "IOREQ": "fields",
    "DATA": "data",
    "RING_POINTERS": "pointers",
    "RING_POINTER": "pointer",
    "RING_SLOT": "entry",
}
WRITE = Request(None, RequestKind.MMIO, False, 0xA0000, 0x1122334455667788, 8)


class Page(bytearray):
    """A shared page that notes who loads and stores a state."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(4096)
        self.log = log

    def __getitem__(self, position: int) -> int:  # type: ignore[override] # no slices
        self.log.append("load state")
        return super().__getitem__(position)

    def __setitem__(self, position: int, value: int) -> None:  # type: ignore[override] # likewise
        self.log.append("store state")
        super().__setitem__(position, value)


class Fields:
    """A struct that notes when it is loaded from a page and stored to it."""

    def __init__(self, fields: struct.Struct, name: str, log: list[str]) -> None:
        self._fields = fields
        self._name = name
        self._log = log

    def unpack_from(self, page: Page, offset: int = 0) -> tuple[Any, ...]:
        self._log.append(f"load {self._name}")
        return self._fields.unpack_from(page, offset)

    def pack_into(self, page: Page, offset: int, *values: int) -> None:
        self._log.append(f"store {self._name}")
        self._fields.pack_into(page, offset, *values)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to a page, in order."""
    log: list[str] = []
    for name, text in NAMES.items():
        monkeypatch.setattr(ioreq, name, Fields(getattr(ioreq, name), text, log))
    return log


@pytest.fixture
def page(log: list[str]) -> memoryview:
    return Page(log)  # type: ignore[return-value] # what is done to a view can be done to it


def taken(log: list[str]) -> list[str]:
    """Return what was noted, and forget it."""
    noted = log[:]
    log.clear()
    return noted


def test_a_slot(page: memoryview, log: list[str]) -> None:
    """The fence stands after each load of a state and before each store of one, on both sides."""
    slot = RequestSlot(page, 1, lambda: log.append("fence"))
    assert slot.state == 0
    assert taken(log) == ["load state", "fence"]
    looked = ["load state", "fence"]
    moved = ["load state", "fence", "store state"]
    slot.send(WRITE)
    assert taken(log) == [*looked, "load fields", "store fields", *moved]
    slot.begin()
    assert taken(log) == moved
    slot.answer(5)
    assert taken(log) == [*looked, "store data", *moved]
    assert slot.take() == 5
    assert taken(log) == [*looked, "load data", *moved]


def test_a_ring(page: memoryview, log: list[str]) -> None:
    """The fence stands after each load of the pointers and before each store of one."""
    ring = BufferedRing(page, lambda: log.append("fence"))
    looked = ["load pointers", "fence"]
    assert ring.peek() is None
    assert taken(log) == looked
    assert ring.append(WRITE)
    assert taken(log) == [*looked, "store entry", "store entry", "fence", "store pointer"]
    assert ring.write_pointer == 2
    assert taken(log) == looked
    request = ring.peek()
    assert request == WRITE
    assert taken(log) == [*looked, "load entry", "load entry"]
    ring.consume(WRITE)
    assert taken(log) == ["load pointers", "fence", "store pointer"]
    ring.discard()
    assert taken(log) == [*looked, "fence", "store pointer"]


def test_without_a_fence(page: memoryview, log: list[str]) -> None:
    """The order is the same where the processor keeps it."""
    slot = RequestSlot(page, 1)
    slot.send(WRITE)
    slot.begin()
    log.clear()
    slot.answer(5)
    assert taken(log) == ["load state", "store data", "load state", "store state"]
