"""A real Linux guest's memory, written by us and read by the tools that people use.

Every page that a tool reads is compared with the source. A tool that is not installed is a
skipped test; `.ci/nightly tools` installs all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.images import tools
from tests.images.lab import Images
from xenmapcache import (
    Backend,
    MapCache,
    find_vmcoreinfo,
    open_source,
    write_coredump,
    write_lime,
    write_vmcore,
)
from xenmapcache.address import PAGE_SIZE, MiB

pytestmark = pytest.mark.images

BANNER = b"Linux version "
KERNEL_MAP = 0xFFFFFFFF80000000
RAM_PAGES = 0x7F40
"""Of the guest, without its first MiB."""


class Guest:
    """A source, what it has, and the files that were written of it."""

    def __init__(self, source: Backend, folder: Path) -> None:
        self.source = source
        self.vmcore = folder / "guest.vmcore"
        self.lime = folder / "guest.lime"
        self.coredump = folder / "guest.core"
        self.pages = write_vmcore(source, self.vmcore, machine="x86-64")
        self._cache = MapCache(source)
        assert source.memory_end is not None
        self.ranges = list(self._cache.present(0, source.memory_end))

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield all memory by its addresses."""
        for start, length in self.ranges:
            for address in range(start, start + length, MiB):
                size = min(MiB, start + length - address)
                yield address, self._cache.read(address, size)

    def info(self, key: str) -> str:
        """Return a value of the VMCOREINFO in memory."""
        found = find_vmcoreinfo(self._cache)
        assert found is not None
        assert found.describes(self._cache.read)
        value = found.value(key)
        assert value is not None
        return value

    def close(self) -> None:
        self._cache.close()
        self.source.close()


@pytest.fixture(scope="module", params=["plain.elf", "guest.raw"])
def guest(
    request: pytest.FixtureRequest, lab_images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """The guest from a file with notes, and from one that has nothing but memory."""
    path = lab_images.path(request.param)
    source = open_source(f"raw:{path}" if path.suffix == ".raw" else path)
    guest = Guest(source, tmp_path_factory.mktemp("dumps"))
    yield guest
    guest.close()
    for file in guest.vmcore.parent.iterdir():
        file.unlink()  # 150 MB each


def assert_same(guest: Guest, path: Path) -> None:
    """Compare a file with the guest through our own readers."""
    with open_source(path) as backend, MapCache(backend) as cache:
        assert list(cache.present(0, backend.memory_end or 0)) == guest.ranges
        for address, data in guest.chunks():
            assert cache.read(address, len(data)) == data


def test_our_own_readers(guest: Guest) -> None:
    """Each form has each page; an xl dump-core file in between loses nothing."""
    assert_same(guest, guest.vmcore)
    write_lime(guest.source, guest.lime)
    assert_same(guest, guest.lime)
    write_coredump(guest.source, guest.coredump)
    assert_same(guest, guest.coredump)
    again = guest.coredump.with_name("again.vmcore")
    with open_source(guest.coredump) as source:
        assert write_vmcore(source, again) == guest.pages
    assert_same(guest, again)


@pytest.mark.parametrize("form", ["compressed.kdump", "makedumpfile-zeros.kdump", "paging.elf"])
def test_from_other_forms(lab_images: Images, tmp_path: Path, form: str) -> None:
    """A core of a compressed dump has its pages, its holes and its notes."""
    path = tmp_path / "guest.vmcore"
    with open_source(lab_images.path(form)) as source, MapCache(source) as cache:
        write_vmcore(cache, path)
        with open_source(path) as backend, MapCache(backend) as found:
            assert getattr(backend, "notes") == getattr(source, "notes")  # noqa: B009 - of files
            ranges = list(cache.present(0, source.memory_end or 0))
            assert list(found.present(0, backend.memory_end or 0)) == ranges
            for start, length in ranges:
                for address in range(start, start + length, MiB):
                    size = min(MiB, start + length - address)
                    assert found.read(address, size) == cache.read(address, size)
    path.unlink()


def test_vmcoreinfo_is_the_one_of_the_notes(lab_images: Images) -> None:
    """QEMU has it from the guest's driver; we find the same text in memory."""
    with open_source(lab_images.path("plain.elf")) as source, MapCache(source) as cache:
        found = find_vmcoreinfo(cache)
        assert found is not None
        assert found.text == source.describe()["vmcoreinfo"]
        assert found.describes(cache.read)


def test_drgn(guest: Guest) -> None:
    """With drgn: it finds the kernel's page tables, reads its banner, and has all pages."""
    drgn = tools.module("drgn", "drgn")
    program = drgn.Program()
    program.set_core_dump(guest.vmcore)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    release = guest.info("OSRELEASE")
    assert program["UTS_RELEASE"].string_().decode() == release
    uts = program.read(int(guest.info("SYMBOL(init_uts_ns)"), 16), 390)
    assert uts[130:].partition(b"\0")[0].decode() == release
    for address, data in guest.chunks():
        assert program.read(address, len(data), physical=True) == data
    # The banner by its virtual address, which the physical one and the kernel's map give.
    offset = KERNEL_MAP - int(guest.info("NUMBER(phys_base)"))
    text = int(guest.info("SYMBOL(_stext)"), 16) - offset
    banner = BANNER + release.encode() + b" ("
    place = next(
        address + found.start()
        for address, data in guest.chunks()
        for found in re.finditer(re.escape(banner), data)
        if address + found.start() > text  # other copies are in the kernel's log
    )
    assert program.read(place + offset, len(banner)) == banner


def test_makedumpfile(guest: Guest, tmp_path: Path) -> None:
    """With makedumpfile: it converts the file to KDUMP and to an ELF core of the same pages."""
    makedumpfile = tools.command("makedumpfile")
    said = tools.run(makedumpfile, "-c", "-d", "0", guest.vmcore, tmp_path / "kdump")
    assert "Completed" in said
    assert (tmp_path / "kdump").read_bytes()[:8] == b"KDUMP   "
    tools.run(makedumpfile, "-E", "-d", "0", guest.vmcore, tmp_path / "elf")
    for form in ("kdump", "elf"):
        pages = 0
        with open_source(tmp_path / form) as backend, MapCache(backend) as cache:
            for address, data in guest.chunks():
                for start, length in cache.present(address, len(data)):
                    part = data[start - address : start - address + length]
                    assert cache.read(start, length) == part
                    pages += length // PAGE_SIZE
        assert pages >= RAM_PAGES  # of video memory and ROM the kernel has no pages


def test_gdb(guest: Guest, tmp_path: Path) -> None:
    """With gdb, which knows virtual addresses only: it reads the same bytes."""
    gdb = tools.command("gdb")
    commands = [
        f"dump binary memory {tmp_path}/{start:x} {start:#x} {start + length:#x}"
        for start, length in guest.ranges
    ]
    arguments = [each for line in commands for each in ("-ex", line)]
    tools.run(gdb, "-batch", "-nx", f"--core={guest.vmcore}", *arguments)
    for address, data in guest.chunks():
        start = max(start for start, _ in guest.ranges if start <= address)
        with (tmp_path / f"{start:x}").open("rb") as stream:
            stream.seek(address - start)
            assert stream.read(len(data)) == data


@contextmanager
def volatility_layer(path: Path, kind: str, name: str) -> Iterator[Any]:
    """Open a file in Volatility, as its stackers do."""
    contexts = tools.module("volatility3.framework.contexts", "volatility3")
    layers = tools.module(f"volatility3.framework.layers.{kind}", "volatility3")
    physical = tools.module("volatility3.framework.layers.physical", "volatility3")
    context = contexts.Context()
    context.config["base.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "base", "base"))
    context.config["memory.base_layer"] = "base"
    try:
        yield getattr(layers, name)(context, "memory", "memory")
    finally:
        context.layers["base"].destroy()


@pytest.mark.parametrize(
    ("kind", "name", "form"), [("elf", "Elf64Layer", "vmcore"), ("lime", "LimeLayer", "lime")]
)
def test_volatility(guest: Guest, kind: str, name: str, form: str) -> None:
    """Volatility 3 has all pages of both forms, and no page in a hole."""
    path: Path = getattr(guest, form)
    if not path.exists():
        write_lime(guest.source, path)
    with volatility_layer(path, kind, name) as layer:
        for address, data in guest.chunks():
            assert layer.read(address, len(data)) == data
        for start, length in guest.ranges:
            assert not layer.is_valid(start + length)


def test_volatility_prints_the_banner(guest: Guest) -> None:
    """The plug-in that every analysis begins with finds the kernel."""
    tools.module("volatility3", "volatility3")
    program = Path(tools.module("sys", "").executable).with_name("vol")
    said = tools.run(program, "--quiet", "--offline", "-f", guest.vmcore, "banners.Banners")
    assert f"Linux version {guest.info('OSRELEASE')}" in said


def test_leechcore(guest: Guest) -> None:
    """LeechCore, which MemProcFS reads through, has the same ranges and pages."""
    leechcore = tools.module("leechcorepyc", "leechcorepyc")
    device = leechcore.LeechCore(f"file://file={guest.vmcore}")
    try:
        assert [(each["base"], each["size"]) for each in device.memmap] == guest.ranges
        for address, data in guest.chunks():
            assert device.read(address, len(data)) == data
    finally:
        device.close()


def debug_kernel(guest: Guest) -> Path:
    """Return the kernel with debugging information."""
    return debug_kernel_of(data for _, data in guest.chunks())


def debug_kernel_of(memory: Iterable[bytes]) -> Path:
    """Return the kernel with debugging information of a guest with some memory."""
    banner = next(
        found
        for data in memory
        if (found := re.search(rb"Linux version ([\w.-]+) .{,300}? Debian ([\w.~+-]+) \(", data))
    )
    return tools.debug_kernel(banner[1].decode(), banner[2].decode())


def processes(lab_images: Images) -> dict[int, str]:
    """Return the processes that the guest itself has listed, without those of the list."""
    text = lab_images.path("serial.log").read_text(errors="replace").partition("=== ps")[2]
    rows = re.findall(r"^ +(\d+) 0 +(?:\[([^\]]+)\]|/bin/(\S+))", text, re.MULTILINE)
    return {int(pid): kernel or program for pid, kernel, program in rows}


def test_drgn_lists_tasks(guest: Guest, lab_images: Images) -> None:
    """With the kernel's debug package drgn has each task by name."""
    drgn = tools.module("drgn", "drgn")
    helpers = tools.module("drgn.helpers.linux.pid", "drgn")
    program = drgn.Program()
    program.set_core_dump(guest.vmcore)
    program.load_debug_info([debug_kernel(guest)])
    tasks = {
        task.pid.value_(): task.comm.string_().decode() for task in helpers.for_each_task(program)
    }
    listed = processes(lab_images)
    assert len(listed) > 20
    for pid, name in listed.items():
        kind, _, _ = name.partition("/")
        assert tasks[pid].startswith(kind[:15]), (pid, name, tasks[pid])


def test_crash(guest: Guest) -> None:
    """With crash: it starts with the debug package, knows the kernel, and reads the same memory."""
    crash = tools.command("crash")
    address, data = next(each for each in guest.chunks() if any(each[1][:64]))
    commands = f"sys\nrd -p {address:#x} 8\nrd -64 init_uts_ns 1\nquit\n"
    script = guest.vmcore.with_name("crash.commands")
    script.write_text(commands)
    said = tools.run(crash, "--no_scroll", "-i", script, debug_kernel(guest), guest.vmcore)
    assert re.search(rf"RELEASE: {re.escape(guest.info('OSRELEASE'))}", said)
    found = re.findall(r"^ *([0-9a-f]+):  ([0-9a-f]{16}) ([0-9a-f]{16})", said, re.MULTILINE)
    memory = {int(place, 16): (int(one, 16), int(two, 16)) for place, one, two in found}
    words = memoryview(data[:64]).cast("Q")
    for number in range(0, 8, 2):
        assert memory[address + 8 * number] == (words[number], words[number + 1])
