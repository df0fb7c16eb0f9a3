"""The forms of the guest's memory: which file is which, and how makedumpfile writes its own."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from tests.xen.lab.prerequisites import tool

_PHDRS: Final = 64
"""Where makedumpfile 1.7.2 looks for the program headers, wherever the ELF header says they are."""


class Form(NamedTuple):
    """A file of the guest's memory. Immutable.

    Attributes:
        file: its name in the folder.
        what: one line for people.
        optional: absent if this machine's QEMU or makedumpfile was built without that compression.
    """

    file: str
    what: str
    optional: bool = False


FORMS: Final = (
    Form("plain.elf", "QEMU: an ELF core of physical memory, with video memory and ROM"),
    Form("paging.elf", "QEMU: an ELF core by virtual addresses (-p)"),
    Form("guest.raw", "QEMU: a flat image of the 128 MiB of RAM"),
    Form("guest.migration", "QEMU: a migration stream"),
    Form("flattened.kdump", "QEMU: flattened KDUMP, zlib"),
    Form("flattened-lzo.kdump", "QEMU: flattened KDUMP, lzo", True),
    Form("flattened-snappy.kdump", "QEMU: flattened KDUMP, snappy", True),
    Form("compressed.kdump", "makedumpfile -R of flattened.kdump"),
    Form("moved.elf", "plain.elf with its program headers at offset 64, as makedumpfile wants"),
    Form("makedumpfile-none.kdump", "makedumpfile -d 0 of moved.elf: KDUMP, not compressed"),
    Form("makedumpfile-zlib.kdump", "makedumpfile -c -d 0: KDUMP, zlib"),
    Form("makedumpfile-lzo.kdump", "makedumpfile -l -d 0: KDUMP, lzo", True),
    Form("makedumpfile-snappy.kdump", "makedumpfile -p -d 0: KDUMP, snappy", True),
    Form("makedumpfile-zstd.kdump", "makedumpfile -z -d 0: KDUMP, zstd", True),
    Form("makedumpfile-zeros.kdump", "makedumpfile -c -d 1: all pages of zeros in one place"),
    Form("makedumpfile-excluded.kdump", "makedumpfile -c -d 31: the kernel's pages only"),
    Form("makedumpfile-excluded.elf", "makedumpfile -E -d 31: an ELF core of the kernel's pages"),
    Form("makedumpfile-flat.kdump", "makedumpfile -F -c -d 0: flattened KDUMP, zlib"),
    Form("split-1.kdump", "makedumpfile --split -c -d 0: the first of two"),
    Form("split-2.kdump", "makedumpfile --split -c -d 0: the second of two"),
    Form("registers.txt", "QEMU: the CPU's registers"),
    Form("serial.log", "what the guest printed: its iomem, addresses of symbols, processes"),
)


def write_moved(plain: Path, moved: Path) -> None:
    """Write an ELF core of QEMU's again, with the program headers right after the ELF header."""
    data = bytearray(plain.read_bytes())
    phoff, shoff = struct.unpack_from("<QQ", data, 0x20)
    size, count, section_size, sections = struct.unpack_from("<4H", data, 0x36)
    headers = data[phoff : phoff + size * count]
    # They take up the room of the section headers, which go.
    first = min(offset for offset in _offsets(bytes(headers), size) if offset)
    if _PHDRS + len(headers) > first or (sections and shoff + section_size > first):
        raise ValueError(f"{plain}: the program headers do not fit in front of {first:#x}")
    data[_PHDRS : _PHDRS + len(headers)] = headers
    struct.pack_into("<QQ", data, 0x20, _PHDRS, 0)
    struct.pack_into("<3H", data, 0x3A, 0, 0, 0)
    moved.write_bytes(data)


def _offsets(headers: bytes, size: int) -> list[int]:
    return [struct.unpack_from("<Q", headers, at + 8)[0] for at in range(0, len(headers), size)]


def run_makedumpfile(folder: Path) -> None:
    """Have makedumpfile write its forms of the images in a folder.

    Raises:
        subprocess.CalledProcessError: makedumpfile failed.
    """
    with (folder / "flattened.kdump").open("rb") as flat:
        _makedumpfile(folder, "-R", "compressed.kdump", stdin=flat.fileno())
    write_moved(folder / "plain.elf", folder / "moved.elf")
    _makedumpfile(folder, "-d", "0", "moved.elf", "makedumpfile-none.kdump")
    _makedumpfile(folder, "-c", "-d", "0", "moved.elf", "makedumpfile-zlib.kdump")
    _makedumpfile(folder, "-c", "-d", "1", "moved.elf", "makedumpfile-zeros.kdump")
    _makedumpfile(folder, "-c", "-d", "31", "moved.elf", "makedumpfile-excluded.kdump")
    _makedumpfile(folder, "-E", "-d", "31", "moved.elf", "makedumpfile-excluded.elf")
    built_in = _makedumpfile(folder, "-v")
    for option, name in ("-l", "lzo"), ("-p", "snappy"), ("-z", "zstd"):
        if f"{name}\tenabled" in built_in:
            _makedumpfile(folder, option, "-d", "0", "moved.elf", f"makedumpfile-{name}.kdump")
    with (folder / "makedumpfile-flat.kdump").open("wb") as flat:
        _makedumpfile(folder, "-F", "-c", "-d", "0", "moved.elf", stdout=flat.fileno())
    parts = ("split-1.kdump", "split-2.kdump")
    _makedumpfile(folder, "--split", "-c", "-d", "0", "moved.elf", *parts)


def _makedumpfile(
    folder: Path, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
) -> str:
    command = [tool("makedumpfile"), *arguments]
    done = subprocess.run(
        command, cwd=folder, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=True
    )
    return (done.stdout or b"").decode() + done.stderr.decode()
