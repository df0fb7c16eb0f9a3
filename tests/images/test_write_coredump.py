"""write_coredump(): what it writes is read by pyelftools, by the backend and by Volatility."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, Section

import xenmapcache
from tests.descriptors import open_files
from xenmapcache import (
    Backend,
    ClosedError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
    write_coredump,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends.coredump import CoredumpBackend

from . import xl_files

REAL = Path(__file__).parent / "data/xl-dump-core-pvh.core"
HOLES = [(0xA0000, 0x20000), (0x300000, 0x8000), (0x501000, 0x1000), (0xFFF000, 0x1000)]


@pytest.fixture
def guest() -> MockDomain:
    """A guest of 16 MiB with holes, every third page of it zeros, the others all different."""
    guest = MockHypervisor().create_domain(memory="16M", holes=HOLES, vcpus=2)
    rng = random.Random(8)
    for address in there(guest):
        if address // PAGE_SIZE % 3:
            guest.write(address, rng.randbytes(PAGE_SIZE))
    return guest


def there(guest: MockDomain) -> list[int]:
    """Return the addresses of a guest's pages."""
    holes = {place for start, size in HOLES for place in range(start, start + size, PAGE_SIZE)}
    return [place for place in range(0, guest.memory_end, PAGE_SIZE) if place not in holes]


@pytest.fixture
def source(guest: MockDomain) -> Backend:
    return open_backend("mock", domain=guest)


def section(elf: ELFFile, name: str) -> Section:
    """Return a section by its name."""
    found = elf.get_section_by_name(name)
    assert found is not None
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.core"


def test_every_byte_comes_back(guest: MockDomain, source: Backend, file: Path) -> None:
    """From the live guest to the file and through the backend: all pages equal, all holes holes."""
    pages = there(guest)
    assert write_coredump(source, file) == len(pages)
    with CoredumpBackend(path=file) as backend, MapCache(backend) as cache:
        assert (backend.pages, backend.memory_end) == (len(pages), guest.memory_end - PAGE_SIZE)
        assert (backend.guest_type, backend.vcpus, backend.xen_version) == ("hvm", 2, "0.0")
        with MapCache(source) as live:
            assert list(cache.present(0, 16 * MiB)) == list(live.present(0, 16 * MiB))
        for address in pages:
            assert cache.read(address, PAGE_SIZE) == guest.read(address, PAGE_SIZE)


@pytest.mark.parametrize("name", ["coredump", "save"])
def test_from_a_file(file: Path, tmp_path: Path, name: str) -> None:
    """A dump of a guest in a file has its pages, and says of which Xen it is."""
    gfns = [0, 1, 2, 700, 701, 5000]
    content = (
        xl_files.dump_core(gfns) if name == "coredump" else xl_files.save(xl_files.pages(*gfns))
    )
    origin = tmp_path / "origin"
    origin.write_bytes(content)
    with open_backend(name, path=origin) as source, MapCache(source) as cache:
        assert write_coredump(cache, file) == 6
    with CoredumpBackend(path=file) as backend:
        assert backend.xen_version == ("4.17.7" if name == "coredump" else "4.17")
        for gfn in gfns:
            view = backend.map(gfn, 1, writable=False).view(0, PAGE_SIZE)
            assert view == xl_files.page(gfn)


def test_a_dump_of_itself(file: Path) -> None:
    """A file may be replaced by what is read from it."""
    file.write_bytes(xl_files.dump_core(range(10, 600)))
    with CoredumpBackend(path=file) as source:
        write_coredump(source, file)
    with CoredumpBackend(path=file) as backend:
        view = backend.map(10, 590, writable=False).view(0, 590 * PAGE_SIZE)
        assert view == xl_files.memory(10 * PAGE_SIZE, 590 * PAGE_SIZE)


def test_the_layout_is_xens(file: Path) -> None:
    """The same pages give the same file as Xen's own, but for what only Xen knows."""
    with CoredumpBackend(path=REAL) as source:
        write_coredump(source, file)
    ours, xens = file.read_bytes(), bytearray(REAL.read_bytes())
    assert len(ours) == len(xens)
    with REAL.open("rb") as stream:
        elf = ELFFile(stream)
        notes = section(elf, ".note.Xen")["sh_offset"]
        status = section(elf, ".xen_prstatus")
        version = notes + 16 + 16 + 32 + 16  # the notes before it, and its own header
        known = version + 32
        xens[known : version + 1280] = bytes(1280 - 32)  # by whom it was compiled, and what for
        first = status["sh_offset"]
        xens[first : first + status["sh_size"]] = bytes(status["sh_size"])
    assert ours == xens


def test_pyelftools_reads_it(source: Backend, file: Path) -> None:
    """Sections, entry sizes and notes are as pyelftools wants them."""
    pages = write_coredump(source, file, xen_version="4.20.1", vcpus=4, machine="arm")
    with file.open("rb") as stream:
        elf = ELFFile(stream)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", "EM_ARM")
        assert section(elf, ".xen_pages").data_size == pages * PAGE_SIZE
        table = section(elf, ".note.Xen")
        assert isinstance(table, NoteSection)
        notes = {note["n_type"]: note for note in table.iter_notes()}
        assert [note["n_name"] for note in notes.values()] == ["Xen"] * 4
        described = {int(kind): note["n_descdata"] for kind, note in notes.items()}
        assert struct.unpack("<4Q", described[0x2000001]) == (0xF00FEBEE, 4, pages, 4096)
        assert struct.unpack_from("<QQ16s", described[0x2000002]) == (4, 20, b".1".ljust(16, b"\0"))
        assert (described[0x2000000], described[0x2000003]) == (b"", struct.pack("<Q", 1))


@pytest.mark.skipif(
    importlib.util.find_spec("volatility3") is None, reason="volatility3 is not installed"
)
def test_volatility_reads_it(guest: MockDomain, source: Backend, file: Path) -> None:
    """Volatility 3's layer of Xen's dumps has each page but page 0, which it never reads."""
    from volatility3.framework import contexts
    from volatility3.framework.layers import physical, xen

    write_coredump(source, file)
    context = contexts.Context()
    context.config["base.location"] = file.as_uri()
    context.add_layer(physical.FileLayer(context, "base", "base"))
    context.config["core.base_layer"] = "base"
    layer = xen.XenCoreDumpLayer(context, "core", "core")
    context.add_layer(layer)
    for address in there(guest)[1:]:
        assert layer.read(address, PAGE_SIZE) == guest.read(address, PAGE_SIZE)


def test_zeros_take_no_room(file: Path) -> None:
    """Pages of zeros are gaps in the file, the last ones too."""
    guest = MockHypervisor().create_domain(memory="64M")
    guest.write(32 * MiB, b"the only page")
    with open_backend("mock", domain=guest) as source:
        assert write_coredump(source, file) == 16384
    state = file.stat()
    assert state.st_size > 64 * MiB
    assert state.st_blocks * 512 < 1 * MiB
    with CoredumpBackend(path=file) as backend, MapCache(backend) as cache:
        assert cache.read(32 * MiB, 13) == b"the only page"
        assert cache.read(64 * MiB - PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_only_its_owner_reads_it(source: Backend, file: Path) -> None:
    """A guest's memory holds its secrets."""
    write_coredump(source, file)
    assert file.stat().st_mode & 0o777 == 0o600


def test_progress(source: Backend, file: Path) -> None:
    """It goes from 0 to the end of memory."""
    calls: list[tuple[int, int]] = []
    write_coredump(source, file, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[0] == (0, 16 * MiB)
    assert calls[-1] == (16 * MiB, 16 * MiB)


def test_length(guest: MockDomain, source: Backend, file: Path) -> None:
    """It ends where it is told to; a page of which only a part was asked for is there whole."""
    assert write_coredump(source, file, length=0x3001) == 4
    assert write_coredump(source, file, length="1M") == 256 - 32
    assert write_coredump(source, file, length="1G") == len(there(guest))
    assert write_coredump(source, file, length=0) == 0
    with CoredumpBackend(path=file) as backend:
        assert (backend.pages, backend.memory_end) == (0, 0)


class Failing(Backend):
    """A source of 8 MiB that fails in its third MiB."""

    name = "failing"
    memory_end: int | None = 8 * MiB

    def __init__(self, source: Backend, error: BaseException | None) -> None:
        self.source, self.error = source, error

    def map(self, gfn: int, count: int, *, writable: bool) -> xenmapcache.Mapping:
        if gfn >= 0x200 and self.error is not None:
            raise self.error
        return self.source.map(gfn, count, writable=writable)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [XenCallError("map", 3, 3), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("before", [None, b"a dump of yesterday"])
@pytest.mark.parametrize("named", [False, True])
def test_nothing_is_left(
    source: Backend,
    file: Path,
    error: BaseException,
    before: bytes | None,
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dump that fails or is interrupted leaves no file, and the one that was there as it was."""
    if named:  # as on a file system that knows no file without a name
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_TRUNC)
    if before is not None:
        file.write_bytes(before)
    with pytest.raises(type(error)):
        write_coredump(Failing(source, error), file)
    assert [path.read_bytes() for path in file.parent.iterdir()] == ([before] if before else [])
    assert write_coredump(Failing(source, None), file) > 0
    assert os.listdir(file.parent) == [file.name]


def test_a_file_without_a_name_that_nothing_can_name(
    source: Backend, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc such a file could not be put in its place: it has a name from the beginning."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: "/proc" not in str(path) and exists(path))
    before = open_files()
    assert write_coredump(source, file) > 0
    assert os.listdir(file.parent) == [file.name]
    assert open_files() <= before


def test_a_progress_that_raises(source: Backend, file: Path) -> None:
    """A callback ends the work by an exception, which leaves nothing."""

    def stop(done: int, total: int) -> None:
        if done > MiB:
            raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        write_coredump(source, file, progress=stop)
    assert os.listdir(file.parent) == []


def test_killed(file: Path) -> None:
    """Not even a process that is killed leaves anything where the file system can help that."""
    code = (
        "import sys, time, xenmapcache as x\n"
        "def wait(done, total):\n"
        "    if done: print('begun', flush=True); time.sleep(60)\n"
        "with x.open_backend('mock', memory='16M') as source:\n"
        "    x.write_coredump(source, sys.argv[1], progress=wait)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        child.send_signal(signal.SIGKILL)
    try:
        os.close(os.open(file.parent, os.O_RDWR | os.O_TMPFILE))
    except OSError:
        pytest.skip("this file system knows no file without a name")
    assert os.listdir(file.parent) == []


def test_no_place_for_a_file(source: Backend) -> None:
    """Where no file can be, the system's error is raised before there is any work."""
    with pytest.raises(FileNotFoundError):
        write_coredump(source, "/nonexistent/guest.core")
    calls: list[int] = []
    with pytest.raises(IsADirectoryError):
        write_coredump(source, "/tmp", progress=lambda done, total: calls.append(done))
    assert calls == []


def test_arguments(source: Backend, file: Path) -> None:
    """What is wrong is said before anything is written."""
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"vcpus": 0}, ValueError, "vcpus must be 1 to 65536, not 0"),
        ({"vcpus": "2"}, TypeError, "vcpus must be an int"),
        ({"length": -1}, ValueError, "negative"),
        ({"length": 1 << 53}, ValueError, "52-bit"),
        ({"xen_version": "four"}, ValueError, "xen_version must look like .*, not 'four'"),
        ({"xen_version": "4.17" + "x" * 16}, ValueError, "xen_version"),
        ({"machine": "vax"}, ValueError, "machine must be one of .*, not 'vax'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            write_coredump(source, file, **options)  # type: ignore[arg-type] # some wrong on purpose
    with pytest.raises(TypeError, match="Backend or a MapCache, not int"):
        write_coredump(3, file)  # type: ignore[arg-type] # wrong on purpose
    endless = Failing(source, None)
    endless.memory_end = None
    with pytest.raises(ValueError, match="give a length"):
        write_coredump(endless, file)
    cache = MapCache(source)
    cache.close()
    with pytest.raises(ClosedError):
        write_coredump(cache, file)
    source.close()
    with pytest.raises(ClosedError):
        write_coredump(source, file)
    assert os.listdir(file.parent) == []


def test_it_is_imported_when_it_is_used() -> None:
    """Importing the package brings neither the writer nor what reads files; the name is there."""
    code = (
        "import sys, xenmapcache\n"
        "new = [m for m in ('writers', 'formats.elf', 'files', 'backends.coredump',"
        " 'mock.kernel') if 'xenmapcache.' + m in sys.modules]\n"
        "print(new, 'elftools' in sys.modules, callable(xenmapcache.write_coredump))\n"
        "try: xenmapcache.no_such_name\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ("[] False True\nmodule 'xenmapcache' has no attribute 'no_such_name'\n")


def test_it_streams(file: Path) -> None:
    """However large a guest is, what is held of it is little: no more than some pieces."""
    guest = MockHypervisor().create_domain(memory="64M")
    for address in range(0, 64 * MiB, 64 * PAGE_SIZE):
        guest.write(address, b"page")
    with open_backend("mock", domain=guest) as source:
        write_coredump(source, file, length=0)
        tracemalloc.start()
        write_coredump(source, file)
        assert tracemalloc.get_traced_memory()[1] < 4 * MiB
        tracemalloc.stop()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.core"
    path.write_bytes(xl_files.dump_core([1, 2, 700]))
    return path


def test_the_largest_arguments(small: Path, tmp_path: Path) -> None:
    """All of the address space, and as many processors as can be, are accepted."""
    with CoredumpBackend(path=small) as backend:
        assert write_coredump(backend, tmp_path / "all", length=1 << 52) == 3
        assert write_coredump(backend, tmp_path / "many", vcpus=1 << 16) == 3
        with pytest.raises(ValueError, match="vcpus must be 1 to 65536, not 65537"):
            write_coredump(backend, tmp_path / "more", vcpus=(1 << 16) + 1)


def test_a_disk_that_takes_a_part(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is cut short goes on where it was, and the file is as any other."""
    pwrite = os.pwrite
    with CoredumpBackend(path=small) as backend:
        write_coredump(backend, tmp_path / "whole")
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
        write_coredump(backend, tmp_path / "pieces")
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("name", ["aarch64", "armv7l"])
def test_an_arm_guest_has_no_contexts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On an Arm host a dump says so, and has none of the contexts of an x86 guest."""
    monkeypatch.setattr(platform, "machine", lambda: name)
    with CoredumpBackend(path=small) as backend:
        backend.machine = ""
        write_coredump(backend, tmp_path / "arm", vcpus=100)
        write_coredump(backend, tmp_path / "one", vcpus=1)
    assert (tmp_path / "arm").stat().st_size == (tmp_path / "one").stat().st_size
    with CoredumpBackend(path=tmp_path / "arm") as backend:
        assert (backend.machine, backend.vcpus) == ("arm", 100)
