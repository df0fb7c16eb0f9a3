"""Volatility 3 reads a guest through a cache: its holes are holes, and scans skip only those."""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images.writers import Load, elf_core, memory_at
from xenmapcache import MapCache, MockDomain, MockHypervisor, XenCallError, open_backend
from xenmapcache.address import PAGE_SIZE, MiB

pytest.importorskip("volatility3", reason="volatility3 is not installed")

from volatility3.framework import contexts, exceptions
from volatility3.framework.automagic.stacker import LayerStacker
from volatility3.framework.layers.physical import FileLayer
from volatility3.framework.layers.resources import ResourceAccessor
from volatility3.framework.layers.scanners import BytesScanner, RegExScanner

from xenmapcache.adapters import volatility as bridge

HOLES = [(0x3000, PAGE_SIZE), (17 * MiB, MiB), (33 * MiB, PAGE_SIZE)]
END = 40 * MiB


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory=END, holes=HOLES)


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield cache


@pytest.fixture
def layer(cache: MapCache) -> Any:  # noqa: ANN401 - Volatility has no types
    return stacked(bridge.register(cache, "mock:40M"))


def stacked(location: str) -> Any:  # noqa: ANN401 - Volatility has no types
    """Return the layer that Volatility puts on the file of a location."""
    context = contexts.Context()
    context.config["file.location"] = location
    context.add_layer(FileLayer(context, "file", "FileLayer"))
    names = LayerStacker.stack_layer(context, "FileLayer", [bridge.XenMapCacheStacker])
    return context.layers[names[0]]


def scan(layer: Any, scanner: Any, **options: Any) -> list[Any]:  # noqa: ANN401 - Volatility's
    return list(layer.scan(layer.context, scanner, **options))


def test_reads_and_holes(layer: Any, guest: MockDomain) -> None:  # noqa: ANN401 - Volatility's
    """A read gives the guest's bytes; one of a hole fails at its address, or is padded."""
    guest.write(0x2FF8, b"the edge")
    assert (layer.minimum_address, layer.maximum_address) == (0, END - 1)
    assert layer.read(0x2FF8, 8) == b"the edge"
    with pytest.raises(exceptions.InvalidAddressException) as error:
        layer.read(0x2FF8, 16)
    assert error.value.invalid_address == 0x3000
    assert layer.read(0x2FF8, 16, pad=True) == b"the edge" + bytes(8)
    for address, length in ((-1, 4), (0, -1)):
        with pytest.raises(exceptions.InvalidAddressException):
            layer.read(address, length)


def test_which_ranges_are_valid(layer: Any) -> None:  # noqa: ANN401 - Volatility's
    """Those without a hole, in memory."""
    for address, length, valid in (
        (0, 1, True),
        (0x2FFF, 1, True),
        (0x2FFF, 2, False),
        (0x3000, 1, False),
        (0x4000, 16 * MiB, True),
        (0, END, False),
        (END - 1, 1, True),
        (END - 1, 2, False),
        (-5, 1, False),
    ):
        assert layer.is_valid(address, length) is valid
    with pytest.raises(ValueError, match="length must be positive, not 0"):
        layer.is_valid(0, 0)


def test_nothing_is_written(layer: Any, guest: MockDomain) -> None:  # noqa: ANN401 - Volatility's
    """The layer is read-only, whatever the source is."""
    with pytest.raises(exceptions.LayerException, match="nothing is written to 0x1000"):
        layer.write(0x1000, b"data")
    assert guest.read(0x1000, 4) == bytes(4)


def test_a_scan_skips_holes_and_nothing_else(layer: Any, guest: MockDomain) -> None:  # noqa: ANN401 - Volatility's
    """It finds each needle once: at the edges of holes and of chunks, and across these."""
    edges = [0, 0x3000, 0x4000, 17 * MiB, 18 * MiB, 33 * MiB, 33 * MiB + PAGE_SIZE, END]
    chunks = [0x4000 + 16 * MiB, 18 * MiB + 15 * MiB, 16 * MiB]
    places = {at for edge in edges for at in (edge, edge - 6)} | {at - 3 for at in chunks}
    needles = sorted(
        at
        for at in places
        if at >= 0
        and all(at + 6 <= start or at >= start + size for start, size in [*HOLES, (END, END)])
    )
    assert len(needles) == 10
    for at in needles:
        guest.write(at, b"needle")
    assert scan(layer, BytesScanner(b"needle")) == needles
    assert scan(layer, RegExScanner(b"nee.le")) == needles
    for start, length in ((0x2000, 0x3000), (0x3000, 0x2000), (0x3000, PAGE_SIZE)):
        part = scan(layer, BytesScanner(b"needle"), sections=[(start, length)])
        assert part == [at for at in needles if start <= at < start + length]


@pytest.mark.parametrize("size", [16 * MiB, 16 * MiB + 100, 16 * MiB + PAGE_SIZE, 17 * MiB])
def test_the_end_of_a_chunk_is_scanned_once(size: int) -> None:
    """Whatever lies after it: Volatility's own layers report what is just before it twice."""
    size += -size % PAGE_SIZE
    guest = MockHypervisor().create_domain(memory=size)
    guest.write(16 * MiB - 100, b"needle")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        layer = stacked(bridge.register(cache, f"mock:{size}"))
        assert scan(layer, BytesScanner(b"needle")) == [16 * MiB - 100]


def test_pages_that_vanish_during_a_scan(
    layer: Any,  # noqa: ANN401 - Volatility's
    guest: MockDomain,
    cache: MapCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rest of their chunk is scanned, and each needle is found once."""
    needles = [0x5000, 0x9000, 16 * MiB - 3 + 0x4000, 16 * MiB + 0x4800]
    for at in needles:
        guest.write(at, b"needle")
    guest.balloon_out(0x7000, PAGE_SIZE)
    cache.invalidate()
    real, calls = bridge.XenMapCacheLayer._present, iter([[(0x4000, 17 * MiB - 0x4000)]])

    def present(self: Any, start: int, length: int) -> Iterator[tuple[int, int]]:  # noqa: ANN401 - Volatility's
        return iter(next(calls, None) or real(self, start, length))

    monkeypatch.setattr(bridge.XenMapCacheLayer, "_present", present)
    section = [(0x4000, 17 * MiB - 0x4000)]
    assert scan(layer, BytesScanner(b"needle"), sections=section) == needles
    assert not caplog.records

    parts = [(0x4000, 0x2000), (0x7000, 0x1000), (0x8000, 16 * MiB - 0x3C00)]
    calls = iter([section, [*parts, (16 * MiB + 0x4800, 8)]])
    assert scan(layer, BytesScanner(b"needle"), sections=section) == needles
    assert "0x1000 bytes at 0x7000 vanished during the scan" in caplog.text


def test_another_failure_is_logged(
    layer: Any,  # noqa: ANN401 - Volatility's
    cache: MapCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Because Volatility's scan ends silently at any exception."""

    def read(self: MapCache, address: int, length: int, *, fill: int | None = None) -> bytes:
        raise XenCallError("xenforeignmemory_map", 1, 1, "the domain has gone")

    monkeypatch.setattr(MapCache, "read", read)
    assert scan(layer, BytesScanner(b"needle")) == []
    (record,) = [each for each in caplog.records if each.name == "xenmapcache"]
    assert "XenMapCacheLayer at 0x0 cannot be read" in record.getMessage()


def test_random_memory_with_holes(guest: MockDomain, layer: Any) -> None:  # noqa: ANN401 - Volatility's
    """A scan for single bytes finds what a look at each page finds."""
    rng = random.Random(13)
    for address in range(0, 0x40000, PAGE_SIZE):
        if address != 0x3000:
            guest.write(address, rng.randbytes(PAGE_SIZE))
    expected = [
        address + at
        for address in range(0, 0x40000, PAGE_SIZE)
        if address != 0x3000
        for at, byte in enumerate(guest.read(address, PAGE_SIZE))
        if byte == 0x77
    ]
    assert scan(layer, BytesScanner(b"\x77"), sections=[(0, 0x40000)]) == expected


def test_a_copy_of_the_layer_reads(layer: Any, guest: MockDomain) -> None:  # noqa: ANN401 - Volatility's
    """Volatility clones contexts, so a layer holds no cache."""
    guest.write(0x1000, b"text")
    clone = copy.deepcopy(layer.context).layers[layer.name]
    assert clone.read(0x1000, 4) == b"text"
    assert clone.location == layer.location
    assert pickle.loads(pickle.dumps(layer._location)) == layer.location
    assert layer.build_configuration()["location"] == layer.location


def test_another_process_opens_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the parent is of no use to it; the location says what to open, and how."""
    path = tmp_path / "guest core.elf"
    path.write_bytes(elf_core([Load(0x1000, memory_at(0x1000, 2 * PAGE_SIZE))])[: -PAGE_SIZE // 2])
    with open_backend("elfcore", path=path, salvage=True) as backend, MapCache(backend) as cache:
        layer = stacked(bridge.register(cache, str(path), salvage=True, zeros=False))
        assert layer.read(0x1000, 8) == memory_at(0x1000, 8)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert layer.read(0x1000, 8) == memory_at(0x1000, 8)
    bridge._caches.popitem()[1].close()


def test_sources_without_a_size(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volatility cannot use them, and the error says why."""
    monkeypatch.setattr(type(cache.backend), "memory_end", None)
    with pytest.raises(ValueError, match="Volatility needs a size"):
        bridge.register(cache, "mock:40M")


def test_other_locations(tmp_path: Path) -> None:
    """Are opened by others: the handler and the stacker leave them alone."""
    path = tmp_path / "flat.raw"
    path.write_bytes(bytes(PAGE_SIZE))
    layer = stacked(path.as_uri())
    assert type(layer) is FileLayer
    request = urllib.request.Request("file:///x")
    assert bridge.XenMapCacheHandler.default_open(request) is None
    assert not ResourceAccessor().uses_cache(f"{bridge.SCHEME}:///?source=x")
    assert bridge.XenMapCacheStacker.stack(layer.context, "FileLayer") is None
    layer.destroy()


def test_its_names_are_found() -> None:
    """By the name that a configuration has for the layer's class."""
    kind = bridge.XenMapCacheLayer
    assert getattr(sys.modules[kind.__module__], kind.__name__) is kind
