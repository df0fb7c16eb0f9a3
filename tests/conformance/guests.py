"""The guests that the suite runs on: one function a source of guest memory, with what is known."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fake_xen import DOMID, FakeXen, need
from tests.fake_xen.fixtures import MakeFake
from tests.images import kdump_files, writers, xl_files
from tests.xen.control import held_still
from tests.xen.lab.platform import Platform
from xenmapcache import Backend, MockHypervisor, open_backend
from xenmapcache.address import PAGE_SIZE, MiB

BUCKET_PAGES = MiB // PAGE_SIZE

# The guests that are made here: 8 MiB, of which the last 3 are all there.
PAGES = 8 * BUCKET_PAGES
HOLES = [(0xA0, 0x20), (0x300, 8), (0x4F8, 8)]
PRESENT = 0x500

# A live guest is a Linux of 128 MiB, whose kernel lies still from 16 MiB on: frames after the first
# one that a machine may have.
LIVE_SEARCH = [*range(0x1000, 0x7C00, 0x400), *range(0x400, 0x1000, 0x400)]
LIVE_END = 0x9400


class Span(NamedTuple):
    """Consecutive frames, with the place of those that are not there: ``first..end`` of them."""

    gfn: int
    pages: int
    first: int
    end: int


@dataclass
class Guest:
    """A guest, open.

    Attributes:
        backend: over it.
        gfn: where 3 MiB begin that are all there, at the beginning of a bucket of 1 MiB.
        holes: spans with a hole at the ``start``, in the ``middle`` and at the ``end``, as far
            as this guest has such.
        scratch: whether its memory may be changed; it changes under nobody else then, too.
        reopen: opens another backend of it.
        open_absent: opens and maps a guest that is not there.
        read: as the guest reads; None if that cannot be seen.
        write: as the guest writes.
        dirty: the frames that were reported as written since it was asked last; None if that
            cannot be seen.
        copied: whether its memory may be read into this process's own: it is in a file.
    """

    backend: Backend
    gfn: int
    holes: dict[str, Span]
    scratch: bool
    reopen: Callable[[], Backend]
    open_absent: Callable[[], object]
    read: Callable[[int, int], bytes] | None = None
    write: Callable[[int, bytes], object] | None = None
    dirty: Callable[[], set[int]] | None = None
    copied: bool = False
    pages: int = 3 * BUCKET_PAGES
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.gfn * PAGE_SIZE

    @property
    def hole(self) -> int:
        """A frame that is not there."""
        span = self.holes["end"]
        return span.gfn + span.first


def find_holes(errors: bytes, gfn: int = 0) -> dict[str, Span]:
    """Return a span with a hole at its start, one in its middle, one at its end.

    Args:
        errors: one errno a page.
        gfn: of the first one.
    """
    runs: list[tuple[bool, int, int]] = [(True, gfn, gfn)]
    for bad, pages in groupby(errors, bool):
        start = runs[-1][2]
        runs.append((bad, start, start + len(list(pages))))
    found: dict[str, Span] = {}
    for before, hole, after in zip(runs[:-1], runs[1:], [*runs[2:], (True, 0, 0)], strict=True):
        if not hole[0]:
            continue
        _, first, end = hole
        led = not before[0] and before[2] - before[1] >= 4
        followed = not after[0] and after[2] - after[1] >= 4
        some = min(4, end - first)
        if led:
            found.setdefault("end", Span(first - 4, 4 + some, 4, 4 + some))
        if followed:
            found.setdefault("start", Span(end - some, some + 4, 0, some))
        if led and followed and end - first <= 64:
            found.setdefault("middle", Span(first - 4, end - first + 8, 4, 4 + end - first))
    return found


def made_here(holes: Sequence[tuple[int, int]] = HOLES) -> dict[str, Span]:
    """Return the spans of a guest that is made here."""
    errors = bytearray(PAGES) + bytes([errno.EINVAL] * 8)
    for gfn, count in holes:
        errors[gfn : gfn + count] = bytes([errno.EINVAL] * count)
    return find_holes(bytes(errors))


@contextmanager
def mock() -> Iterator[Guest]:
    """A guest of the mock hypervisor."""
    hypervisor = MockHypervisor()
    domain = hypervisor.create_domain(
        memory=PAGES * PAGE_SIZE,
        holes=[(gfn * PAGE_SIZE, count * PAGE_SIZE) for gfn, count in HOLES],
    )

    def take_dirty() -> set[int]:
        dirty = set(domain.dirty_gfns)
        domain.dirty_gfns.clear()
        return dirty

    def open_absent() -> object:
        gone = hypervisor.create_domain(memory="1M")
        gone.destroy()
        return open_backend("mock", domain=gone).map(0, 1, writable=False)

    with open_backend("mock", domain=domain) as backend:
        yield Guest(
            backend,
            PRESENT,
            made_here(),
            scratch=True,
            reopen=lambda: open_backend("mock", domain=domain),
            open_absent=open_absent,
            read=domain.read,
            write=domain.write,
            dirty=take_dirty,
        )


@contextmanager
def fake_xen(fake: FakeXen, name: str, binding: str) -> Iterator[Guest]:
    """The guest of a stand-in for Xen's libraries."""

    def reopen(domid: int = DOMID) -> Backend:
        return open_backend(name, domid=domid, binding=binding, library=fake.library)

    with reopen() as backend:
        fake.take_dirty()  # opening has reported a page
        yield Guest(
            backend,
            PRESENT,
            made_here(),
            scratch=True,
            reopen=reopen,
            open_absent=lambda: reopen(DOMID + 1),
            read=fake.read,
            write=fake.write,
            dirty=fake.take_dirty,
        )
    assert fake.misuses == 0


@cache
def survey(domid: int, ram: int) -> tuple[int, dict[str, Span]]:
    """Look once, as it takes seconds under emulation, where a live guest has memory and holes.

    Args:
        domid: of the guest.
        ram: the frame at which its memory begins.
    """
    with open_backend("xen", domid=domid) as backend:
        pages = 3 * BUCKET_PAGES
        for gfn in LIVE_SEARCH:
            if backend.map(ram + gfn, pages, writable=False).errors is None:
                errors = backend.map(ram, LIVE_END, writable=False).errors
                # A larger guest may have no holes so far down.
                return ram + gfn, find_holes(errors or b"", ram)
    raise AssertionError(f"domain {domid} has no 3 MiB in one piece")


@contextmanager
def live(domid: int, ram: int, name: str, binding: str) -> Iterator[Guest]:
    """A live guest, whose memory nobody may change; it stands still while a test looks."""

    def reopen(domid: int = domid) -> Backend:
        return open_backend(name, domid=domid, binding=binding)

    present, holes = survey(domid, ram)
    with held_still(domid), reopen() as backend:
        yield Guest(
            backend,
            present,
            holes,
            scratch=False,
            reopen=reopen,
            open_absent=lambda: reopen(0x7FEF),
        )


def _pfns() -> list[int]:
    holes = {gfn for first, count in HOLES for gfn in range(first, first + count)}
    return [gfn for gfn in range(PAGES) if gfn not in holes]


def _ranges() -> list[tuple[int, int]]:
    edges = [0, *(edge for gfn, count in HOLES for edge in (gfn, gfn + count)), PAGES]
    return [(begin, end - begin) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _saved() -> bytes:
    """What xl save wrote while the guest ran: its first pages come again, and last."""
    pfns = _pfns()
    batches = [xl_files.pages(*pfns[i : i + 1024]) for i in range(0, len(pfns), 1024)]
    return xl_files.save(xl_files.pages(*pfns[:700], copy=1), *batches)


class Image(NamedTuple):
    """A guest in a file: the backend that reads it, what is in the file, and what in the guest."""

    backend: str
    content: Callable[[], bytes]
    read: Callable[[int, int], bytes] = writers.memory_at
    holes: Sequence[tuple[int, int]] = HOLES
    options: dict[str, object] = {}  # noqa: RUF012 - nobody changes it


# kdump aligns pages in its files, QEMU does not; nor does LiME, or Xen for a PV guest.
IMAGES = {
    "coredump-pvh": Image("coredump", lambda: xl_files.dump_core(_pfns()), xl_files.memory),
    "coredump-pv": Image(
        "coredump", lambda: xl_files.dump_core_pv(_pfns(), shift=24), xl_files.memory
    ),
    "save": Image("save", _saved, xl_files.memory),
    "raw": Image("raw", lambda: writers.memory(0, PAGES), holes=[]),
    "raw-ranges": Image(
        "raw",
        lambda: writers.packed(_ranges()),
        options={"ranges": [(gfn * PAGE_SIZE, pages * PAGE_SIZE) for gfn, pages in _ranges()]},
    ),
    "raw-lime": Image("raw", lambda: writers.lime(_ranges())),
    "elfcore": Image("elfcore", lambda: writers.elf_core_of(_ranges(), bits=64, align=PAGE_SIZE)),
    "elfcore-unaligned": Image("elfcore", lambda: writers.elf_core_of(_ranges(), bits=64, align=1)),
    "elfcore-32": Image(
        "elfcore", lambda: writers.elf_core_of(_ranges(), bits=32, align=PAGE_SIZE)
    ),
    "kdump": Image("kdump", lambda: kdump_files.kdump(kdump_files.pages_of(_ranges()))),
    "kdump-flattened": Image(
        "kdump",
        lambda: kdump_files.flattened(
            kdump_files.kdump(kdump_files.pages_of(_ranges()), compression=0), 50_000
        ),
    ),
}


@contextmanager
def in_file(name: str, folder: Path) -> Iterator[Guest]:
    """The guest of that name in :data:`IMAGES`; its file is written once for a whole run."""
    image = IMAGES[name]
    path = folder / name
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_bytes(image.content())

    def reopen(path: Path = path) -> Backend:
        return open_backend(image.backend, path=path, **image.options)

    with reopen() as backend:
        yield Guest(
            backend,
            PRESENT,
            made_here(image.holes),
            scratch=False,
            reopen=reopen,
            open_absent=lambda: reopen(folder / "gone"),
            read=image.read,
            copied=True,
        )


def open_guest(name: str, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Open the guest of that name."""
    if name == "mock":
        with mock() as guest:
            yield guest
        return
    if name in IMAGES:
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "guests"
        with in_file(name, folder) as guest:
            yield guest
        return
    source, _, binding = name.rpartition("-")
    if binding == "cffi":
        need("_cffi_backend")
    if source.startswith("fake-"):
        make_fake: MakeFake = request.getfixturevalue("make_fake")
        fake = make_fake(pages=PAGES, holes=HOLES)
        with fake_xen(fake, source.removeprefix("fake-"), binding) as guest:
            yield guest
        return
    machine: Platform = request.getfixturevalue("machine")
    domid, ram = request.getfixturevalue("live_domid"), machine.memory[0] // PAGE_SIZE
    with live(domid, ram, source, binding) as guest:
        yield guest
