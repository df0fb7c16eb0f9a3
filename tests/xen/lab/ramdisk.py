"""Initial ramdisks and kernel images, made without the tools of a distribution.

Debian's own ramdisk carries udev and hundreds of modules and takes most of an emulated boot; its
kernel is compressed, and unpacking it under emulation costs seconds, twice (Dom0 and guest). Both
are avoided here, when the image is built.
"""

from __future__ import annotations

import gzip
import lzma
import stat
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .prerequisites import tool


def newc(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Pack (name, mode, content) entries as a cpio archive in the kernel's "newc" format."""
    archive = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def ramdisk(init: bytes, busybox: bytes, modules: Iterable[bytes] = ()) -> bytes:
    """A ramdisk of one script, busybox, and modules numbered in the order they must be loaded."""
    # The ramdisk built into every kernel brings the /dev/console that init needs for output.
    folders = ("bin", "dev", "proc", "root", "modules")
    return newc(
        [
            *((name, stat.S_IFDIR | 0o755, b"") for name in folders),
            ("init", stat.S_IFREG | 0o755, init),
            ("bin/busybox", stat.S_IFREG | 0o755, busybox),
            *((f"modules/{i:02}.ko", stat.S_IFREG | 0o644, m) for i, m in enumerate(modules)),
        ]
    )


def drivers(modules: Iterable[bytes]) -> bytes:
    """What is appended to a ramdisk: modules numbered in the order they must be loaded."""
    return newc(
        [
            ("drivers", stat.S_IFDIR | 0o755, b""),
            *((f"drivers/{i:02}.ko", stat.S_IFREG | 0o644, m) for i, m in enumerate(modules)),
        ]
    )


def load_order(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files of modules and their dependencies, in loading order, by depmod's lists in `folder`.

    A module built into the kernel has none.
    """
    depends: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        module, _, needed = line.partition(":")
        depends[module] = needed.split()
    by_name = {_module_name(path): path for path in depends}
    builtin = {_module_name(path) for path in (folder / "modules.builtin").read_text().split()}
    ordered: dict[str, None] = {}
    for name in names:
        if name in builtin:
            continue
        # modules.dep lists the transitive closure, the deepest dependency last.
        ordered.update(dict.fromkeys([*reversed(depends[by_name[name]]), by_name[name]]))
    return [folder / path for path in ordered]


def module(path: Path) -> bytes:
    """A module's object code, unpacked: busybox's insmod knows no compression."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def unpacked(image: bytes) -> bytes:
    """A kernel as a loader takes it that unpacks nothing.

    Of x86 that is the ELF file inside a bzImage; of arm64 the Image, which Debian leaves as it is.
    """
    if image.startswith(b"\x1f\x8b"):
        return gzip.decompress(image)
    return _vmlinux(image) if image[0x202:0x206] == b"HdrS" else image


def _vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage.

    Follows Linux's Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset and
    payload_length at 0x248. The payload's last four bytes are its unpacked size.

    Raises:
        ValueError: the kernel is packed in another way than xz or zstd.
    """
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length - 4]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # No zstd in the standard library before Python 3.14.
        command = [tool("zstd"), "-dc"]
        return subprocess.run(command, input=payload, check=True, capture_output=True).stdout
    raise ValueError(f"kernel packed in an unknown way: {payload[:6].hex()}")


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_")
