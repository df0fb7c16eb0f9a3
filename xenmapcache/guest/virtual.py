"""Virtual addresses: what is asked about them, and what the answers are made of."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from ..errors import TranslationError
from ..formats.pagetables import Rights

_UNSIGNED: Final = ("Q", "L")
"""Formats of buffers; which one is of 64 bits, depends on who made them."""


class MappedPage(NamedTuple):
    """The page of an address that was looked up. Immutable.

    Attributes:
        physical: guest-physical, of the address itself. The page need not exist.
        size: of the page, in bytes.
        rights: what it allows.
    """

    physical: int
    size: int
    rights: Rights


class Step(NamedTuple):
    """What the walk of an address finds at one level. Immutable.

    Attributes:
        level: its name: ``"PML5"``, ``"PML4"``, ``"PDPT"``, ``"PD"``, ``"PT"``; or, on arm64,
            ``"L0"`` to ``"L3"``.
        entry_address: guest-physical, of the entry.
        entry: its value.
        page: what the entry maps; None if it leads to another table, or nowhere.
    """

    level: str
    entry_address: int
    entry: int
    page: MappedPage | None


class Region(NamedTuple):
    """A range of virtual addresses that follow each other in guest memory, too. Immutable.

    Attributes:
        address: virtual.
        length: in bytes.
        physical: guest-physical, where it begins. The page need not exist: it may be a device's.
        rights: what its pages allow.
    """

    address: int
    length: int
    physical: int
    rights: Rights


def missing_page(address: int, physical: int) -> TranslationError:
    """Return the error for a virtual address whose page the source lacks.

    Args:
        address: virtual.
        physical: guest-physical, where the tables lead to.
    """
    return TranslationError(
        address, "the source has no page there: it may be a device's, or be left out of the "
        "file; xenmapcache info lists the present pages", "page", None, physical,
    )  # fmt: skip


def as_array(addresses: Iterable[int]) -> array[int]:
    """Return addresses as an ``array("Q")``, quickly if they are numbers of 64 bits in memory."""
    found = array("Q")
    try:
        view = memoryview(addresses)  # type: ignore[arg-type] # a TypeError is handled
    except TypeError:
        view = memoryview(b"")
    if view.format in _UNSIGNED and view.itemsize == found.itemsize and view.c_contiguous:
        found.frombytes(view.cast("B"))
        return found
    try:
        found.extend(iter(addresses))
    except OverflowError:
        raise ValueError("each address must be from 0 to 2**64 - 1") from None
    return found


def merged(pages: Iterator[Region]) -> Iterator[Region]:
    """Merge pages that follow each other in virtual and in guest memory, with the same rights."""
    begun: Region | None = None
    for page in pages:
        if begun is None:
            begun = page
        elif (
            page.address == begun.address + begun.length
            and page.physical == begun.physical + begun.length
            and page.rights == begun.rights
        ):
            begun = begun._replace(length=begun.length + page.length)
        else:
            yield begun
            begun = page
    if begun is not None:
        yield begun
