"""What a file is, by its first bytes: its format, the backend that reads it, and advice.

This is the only table of formats. A bare path, ``open_source`` and every backend of files use it.
To add a format, add a row; a format that a backend reads has the backend's name in its row.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from ..errors import WrongFormatError
from .content import Content

LONGEST: Final = 0x210
"""Bytes of a file's start that :func:`identify` looks at."""

ReadAt = Callable[[int, int], bytes]
"""Return bytes of a file from an offset on, up to a length; fewer where the file ends."""


class Signature(NamedTuple):
    """A format, and how a file of it begins. Immutable.

    Attributes:
        magic: bytes of the file, at `offset`.
        format: what such a file is, as in "is ...".
        backend: which backend a file of this format is for; empty if none.
        remedy: what to do about a file that no backend reads; empty if `backend` reads it.
        offset: where `magic` lies in the file.
        also: other bytes that the file must have, each with its offset.
        section: a name, between null bytes, that an ELF file's section names must have.
    """

    magic: bytes
    format: str
    backend: str = ""
    remedy: str = ""
    offset: int = 0
    also: tuple[tuple[int, bytes], ...] = ()
    section: bytes = b""

    def advice(self, path: str) -> str:
        """Return what to do about a file of this format.

        Args:
            path: the file's name, for the advice.
        """
        return self.remedy or f"open it as {self.backend}:{path}, or by its path alone"


_UNPACK = "unpack it first"
LEGACY_SAVE = "of the legacy format of Xen 4.5 and earlier"
LEGACY_REMEDY = "restore it there, and save it again with Xen 4.6 or later"
_LITTLE_ENDIAN = "only little-endian files are read"
_WINDOWS = "Volatility 3 and MemProcFS read it"
_VMWARE = "a suspended guest or a snapshot of VMware (.vmss, .vmsn)"
_VMWARE_REMEDY = (
    "give the pair of this file and its .vmem file to Volatility 3, or convert it to an ELF core "
    "with vmss2core"
)
_VIRSH = "restore the guest with virsh restore, then run virsh dump --memory-only"
_DISK = "the memory of a guest is not in it; dump the memory of the guest that uses it"
_EVIDENCE = "export the raw content with ewfexport of libewf"
_XEN_SERVER = "a suspend image of XenServer or XCP-ng"

_ELF = b"\x7fELF"
_ELF64, _BIG_ELF32, _BIG_ELF64 = _ELF + b"\2\1", _ELF + b"\1\2", _ELF + b"\2\2"
_CORE = ((16, b"\4\0"),)
"""e_type is ET_CORE."""

EMPTY: Final = Signature(
    b"", "empty", "", "the dump failed or its disk was full; write the dump again"
)
"""A file without bytes. It is not in :data:`SIGNATURES`, because every file begins so."""

SIGNATURES: Final = (
    # Saved guests of Xen.
    Signature(b"Xen saved domain", "a file of xl save", "save"),
    Signature(b"LibxlFmt", "a stream of libxl", "save"),
    Signature(b"\xff" * 8 + b"XENF", "a stream of libxc", "save"),
    Signature(b"libvirt-xml\n \0 \r", "a Xen guest that virsh save wrote", "save"),
    Signature(b"XenSavedDomv2-\n", _XEN_SERVER, "save"),
    Signature(b"LinuxGuestRecord", LEGACY_SAVE, "save", LEGACY_REMEDY),
    Signature(b"XenSavedDomain", LEGACY_SAVE, "save", LEGACY_REMEDY),
    # Dumps of memory.
    Signature(b"EMiL", "a LiME file", "raw"),
    Signature(b"LiME", "a big-endian LiME file", "", _LITTLE_ENDIAN),
    Signature(b"AVML", "compressed by AVML", "", "convert it to LiME with avml-convert"),
    Signature(_ELF64, "a file of xl dump-core", "coredump", also=_CORE, section=b"\0.xen_pages\0"),
    Signature(_ELF64, "an ELF core of 64 bits", "elfcore", also=_CORE),
    Signature(_ELF + b"\1\1", "an ELF core of 32 bits", "elfcore", also=_CORE),
    Signature(_BIG_ELF64, "a big-endian ELF file", "elfcore", _LITTLE_ENDIAN),
    Signature(_BIG_ELF32, "a big-endian ELF file", "elfcore", _LITTLE_ENDIAN),
    Signature(
        _ELF,
        "an ELF file, but not a core",
        "",
        "programs, libraries and vmlinux have no guest memory; open a dump of the guest",
    ),
    Signature(b"KDUMP   ", "a dump in makedumpfile's compressed format", "kdump"),
    Signature(b"DISKDUMP", "a dump in diskdump's compressed format", "kdump"),
    Signature(b"makedumpfile\0", "a flattened dump", "kdump"),
    Signature(
        b"\xed\xeb\x0f\xf0", "an old file of xm dump-core", "", "dump again with Xen 3.1 or later"
    ),
    Signature(
        b"\xee\xeb\x0f\xf0", "an old file of xm dump-core", "", "dump again with Xen 3.1 or later"
    ),
    Signature(b"PAGEDU64", "a Windows crash dump of 64 bits", "", _WINDOWS),
    Signature(b"PAGEDUMP", "a Windows crash dump of 32 bits", "", _WINDOWS),
    Signature(b"MDMP", "a Windows minidump", "", "it has no guest memory; take a full dump"),
    *(
        Signature(magic, "a hibernation file of Windows", "", _WINDOWS)
        for magic in (b"hibr", b"HIBR", b"wake", b"WAKE", b"rstr", b"RSTR", b"HORM")
    ),
    # Saved guests of other hypervisors.
    *(
        Signature(magic, _VMWARE, "", _VMWARE_REMEDY)
        for magic in (
            b"\xd0\xbe\xd0\xbe",
            b"\xd1\xbe\xd1\xbe",
            b"\xd0\xbe\xd2\xbe",
            b"\xd2\xbe\xd2\xbe",
            b"\xd3\xbe\xd2\xbe",
            b"\xd3\xbe\xd3\xbe",
            b"\xd1\xba\xd1\xba",
            b"\xd2\xba\xd2\xba",
        )
    ),
    Signature(
        b"\x7fVirtualBox SavedState",
        "a saved state of VirtualBox (.sav)",
        "",
        "start the guest, then write an ELF core with VBoxManage debugvm NAME dumpvmcore",
    ),
    Signature(
        b"QEVM",
        "a migration stream of QEMU",
        "",
        "load it into QEMU (-incoming 'exec:cat FILE'), then run dump-guest-memory in its monitor",
    ),
    Signature(b"LibvirtQemudSave", "a QEMU guest that virsh save wrote", "", _VIRSH),
    Signature(
        b"LibvirtQemudPart",
        "an unfinished file of virsh save of a QEMU guest",
        "",
        "save the guest again",
    ),
    # Disks and evidence.
    Signature(b"QFI\xfb", "a disk of QEMU (qcow2)", "", _DISK),
    Signature(b"KDMV", "a disk of VMware (VMDK)", "", _DISK),
    Signature(b"conectix", "a disk of Xen or Hyper-V (VHD)", "", _DISK),
    Signature(b"vhdxfile", "a disk of Hyper-V (VHDX)", "", _DISK),
    Signature(b"\x7f\x10\xda\xbe", "a disk of VirtualBox (VDI)", "", _DISK, offset=0x40),
    Signature(b"EVF\t\r\n\xff\0", "an EnCase image (E01)", "", _EVIDENCE),
    Signature(b"LVF\t\r\n\xff\0", "an EnCase image (L01)", "", _EVIDENCE),
    Signature(b"EVF2\r\n\x81\0", "an EnCase image (Ex01)", "", _EVIDENCE),
    # Compressed files and archives.
    Signature(b"\x1f\x8b", "compressed by gzip", "", _UNPACK),
    Signature(b"\xfd7zXZ", "compressed by xz", "", _UNPACK),
    Signature(b"\x28\xb5\x2f\xfd", "compressed by zstd", "", _UNPACK),
    Signature(b"BZh", "compressed by bzip2", "", _UNPACK),
    Signature(b"\x04\x22\x4d\x18", "compressed by lz4", "", _UNPACK),
    Signature(b"\x02\x21\x4c\x18", "compressed by lz4", "", _UNPACK),
    Signature(b"\x89LZO\0\r\n\x1a\n", "compressed by lzop", "", _UNPACK),
    Signature(b"LZIP", "compressed by lzip", "", _UNPACK),
    Signature(b"\xff\x06\0\0sNaPpY", "compressed by Snappy", "", _UNPACK),
    Signature(b"PK\3\4", "a zip archive", "", _UNPACK),
    Signature(b"PK\5\6", "a zip archive", "", _UNPACK),
    Signature(b"PK\7\x08", "a zip archive", "", _UNPACK),
    Signature(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "", _UNPACK),
    Signature(b"Rar!\x1a\7", "a rar archive", "", _UNPACK),
    Signature(b"ustar", "a tar archive", "", _UNPACK, offset=257),
    # Kernels.
    Signature(
        b"HdrS",
        "a packed Linux kernel (vmlinuz)",
        "",
        "it has no guest memory; open a dump of the guest",
        offset=0x202,
    ),
    Signature(
        b"ARM\x64",
        "a Linux kernel for arm64 (Image)",
        "",
        "it has no guest memory; open a dump of the guest",
        offset=0x38,
    ),
)
"""Each format by its first bytes. The first row that fits counts."""

BACKENDS: Final = tuple(sorted({row.backend for row in SIGNATURES if row.backend}))
"""The backends of files."""

_ELF_BACKENDS = ("coredump", "elfcore")
_SECTIONS = struct.Struct("<Q10x3H")
"""e_shoff, and from 0x3a on e_shentsize, e_shnum, e_shstrndx; at 0x28 of an ELF64 header."""
_NAMES_OF_SECTION = struct.Struct("<QQ")
"""sh_offset and sh_size; at 0x18 of an ELF64 section header."""
_MAX_NAME_BYTES = 1 << 16
_MAX_OFFSET = 1 << 62
"""Beyond any file. pread refuses larger offsets."""


def identify(start: bytes, section_names: bytes = b"") -> Signature | None:
    """Return what a file is; None if that is not known, as of a flat image.

    Args:
        start: the first :data:`LONGEST` bytes of the file, fewer if it is shorter.
        section_names: of an ELF file, as they lie in it.
    """
    if not start:
        return EMPTY
    for row in SIGNATURES:
        if (
            start.startswith(row.magic, row.offset)
            and all(start.startswith(data, offset) for offset, data in row.also)
            and row.section in section_names
        ):
            return row
    return None


def recognise(read: ReadAt) -> Signature | None:
    """Return what a file is, as :func:`identify` does.

    Args:
        read: of the file. It is called for at most 64 KiB at a time.
    """
    start = read(0, LONGEST)
    if not start.startswith(_ELF64) or len(start) < 64:
        return identify(start)
    shoff, size, count, index = _SECTIONS.unpack_from(start, 0x28)
    section = read(min(shoff + size * index, _MAX_OFFSET), 64) if index < count else b""
    if len(section) < 64:
        return identify(start)
    offset, length = _NAMES_OF_SECTION.unpack_from(section, 0x18)
    return identify(start, read(min(offset, _MAX_OFFSET), min(length, _MAX_NAME_BYTES)))


def signature_of(content: Content) -> Signature | None:
    """Return what a file is, as :func:`identify` does."""

    def read(offset: int, length: int) -> bytes:
        length = min(length, content.size - offset)
        return content.read(offset, length) if length > 0 else b""

    return recognise(read)


def refuse_others(content: Content, backend: str, wanted: str = "", hint: str = "") -> None:
    """Refuse a file whose format is known, and is not what a backend reads.

    An empty file, and an ELF file that a backend of ELF files cannot read, are left to the
    backend's parser, which says more.

    Args:
        content: the file.
        backend: which one opens the file.
        wanted: the format that it reads, for the message.
        hint: added to the message.

    Raises:
        WrongFormatError: with the format of the file, and what to do.
    """
    found = signature_of(content)
    if found is None or found is EMPTY or (found.backend == backend and not found.remedy):
        return
    is_elf = found.magic.startswith(_ELF) and found.magic not in (_BIG_ELF32, _BIG_ELF64)
    if is_elf and backend in _ELF_BACKENDS:
        return
    instead = f", not {wanted}" if wanted and found.backend != backend else ""
    raise WrongFormatError(
        f"{content.path} is {found.format}{instead}: {found.advice(content.path)}{hint}"
    )
