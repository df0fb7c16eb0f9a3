"""What ``xl dump-core`` and ``xl save`` write, made here: nothing of the package is used."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PAGE = 4096
PADDING = 2**64 - 1
PV, HVM = 0xF00FEBED, 0xF00FEBEE
X86_64, X86_32, ARM = 62, 3, 40
PVH_SECTIONS = (".shstrtab", ".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_pfn")
PV_SECTIONS = (".shstrtab", ".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_p2m")


def page(gfn: int, copy: int = 0) -> bytes:
    """The bytes of a page: each differs from all others in each 8 bytes."""
    return struct.pack("<IHH", gfn & 0xFFFFFFFF, gfn >> 32 & 0xFFFF, copy) * (PAGE // 8)


def note(kind: int, data: bytes, name: bytes = b"Xen\0") -> bytes:
    return struct.pack("<III", len(name), len(data), kind) + name + data + bytes(-len(data) % 4)


@dataclass
class Core:
    """A file of xl dump-core.

    Attributes:
        pfns: in the order of the pages; PADDING is one of them.
        order: the sections in the order of their headers, and of their contents.
        changes: by section, what its header should say instead of the truth.
    """

    pfns: Sequence[int]
    magic: int = HVM
    machine: int = X86_64
    order: Sequence[str] = PVH_SECTIONS
    vcpus: int = 1
    pages: int | None = None
    page_size: int = PAGE
    format_version: int = 1
    xen: tuple[int, int, bytes] = (4, 17, b".7")
    changes: dict[str, dict[str, int]] = field(default_factory=dict)
    shift: int = 0
    notes: bytes | None = None
    contexts: bytes | None = None

    def contents(self) -> dict[str, bytes]:
        count = len(self.pfns) if self.pages is None else self.pages
        names = b"\0" + b"".join(name.encode() + b"\0" for name in dict.fromkeys(self.order))
        header = struct.pack("<QQQQ", self.magic, self.vcpus, count, self.page_size)
        notes = (
            note(0x2000000, b"")
            + note(0x2000001, header)
            + note(0x2000002, struct.pack("<QQ16s", *self.xen) + bytes(1240))
            + note(0x2000003, struct.pack("<Q", self.format_version))
        )
        return {
            ".shstrtab": names,
            ".note.Xen": notes if self.notes is None else self.notes,
            ".xen_prstatus": bytes(5168 * self.vcpus) if self.contexts is None else self.contexts,
            ".xen_shared_info": b"\x5a" * PAGE,
            ".xen_pages": b"".join(bytes(PAGE) if n == PADDING else page(n) for n in self.pfns),
            ".xen_pfn": b"".join(struct.pack("<Q", n) for n in self.pfns),
            ".xen_p2m": b"".join(
                struct.pack("<QQ", n, n if n == PADDING else n + 0x100000) for n in self.pfns
            ),
        }

    def build(self) -> bytes:
        contents = self.contents()
        names = contents[".shstrtab"]
        position = 64 + 64 * (1 + len(self.order))
        headers = bytes(64)
        body = b""
        for name in self.order:
            content = contents[name]
            gap = -(position + len(body)) % PAGE + self.shift if name == ".xen_pages" else 0
            body += bytes(gap)
            fields = {
                "name": names.index(name.encode() + b"\0"),
                "type": {".shstrtab": 3, ".note.Xen": 7}.get(name, 1),
                "flags": 0,
                "address": 0,
                "offset": position + len(body),
                "size": len(content),
                "link": 0,
                "info": 0,
                "align": 0,
                "entry": 0,
            } | self.changes.get(name, {})
            headers += struct.pack("<IIQQQQIIQQ", *fields.values())
            body += content
        elf = {
            "ident": b"\x7fELF\2\1\1\0\1",
            "type": 4,
            "machine": self.machine,
            "version": 1,
            "entry": 0,
            "phoff": 0,
            "shoff": 64,
            "flags": 0,
            "ehsize": 64,
            "phentsize": 56,
            "phnum": 0,
            "shentsize": 64,
            "shnum": 1 + len(self.order),
            "shstrndx": 1 + list(self.order).index(".shstrtab") if ".shstrtab" in self.order else 0,
        } | self.changes.get("elf", {})
        return struct.pack("<16sHHIQQQIHHHHHH", *elf.values()) + headers + body


def dump_core(pfns: Iterable[int], **options: object) -> bytes:
    """A file of xl dump-core of an HVM or PVH guest."""
    return Core(list(pfns), **options).build()  # type: ignore[arg-type] # Core's own


def dump_core_pv(pfns: Iterable[int], **options: object) -> bytes:
    """A file of xl dump-core of a PV guest."""
    return dump_core(pfns, **({"magic": PV, "order": PV_SECTIONS} | options))


# --- xl save -----------------------------------------------------------------------

END, PAGE_DATA, VERIFY, CHECKPOINT, STATIC_DATA_END = 0, 1, 0xD, 0xE, 0x10
BROKEN, XALLOC, XTAB = 0xD, 0xE, 0xF
XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"


def record(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    """A record of libxl or libxc."""
    size = len(body) if length is None else length
    return struct.pack("<II", kind, size) + body + bytes(-len(body) % 8)


def pages(*entries: int | tuple[int, int], copy: int = 0, count: int | None = None) -> bytes:
    """A record of pages: of pfns, or ``(pfn, type)``."""
    numbers = [entry if isinstance(entry, tuple) else (entry, 0) for entry in entries]
    body = struct.pack("<II", len(numbers) if count is None else count, 0)
    body += b"".join(struct.pack("<Q", gfn | kind << 60) for gfn, kind in numbers)
    body += b"".join(page(gfn, copy) for gfn, kind in numbers if kind not in (13, 14, 15))
    return record(PAGE_DATA, body)


def libxc(
    *records: bytes, version: int = 3, options: int = 0, kind: int = 2, shift: int = 12
) -> bytes:
    """A stream of libxc, without an END of its own."""
    return (
        struct.pack(">8s4sIHHI", b"\xff" * 8, b"XENF", version, options, 0, 0)
        + struct.pack("<IHHII", kind, shift, 0, 4, 17)
        + b"".join(records)
    )


def libxl(stream: bytes, *records: bytes, version: int = 2, options: int = 0) -> bytes:
    """A stream of libxl around one of libxc, without an END of its own."""
    head = struct.pack(">8sII", b"LibxlFmt", version, options)
    return head + record(1) + stream + b"".join(records)


def xl(
    stream: bytes, *, config: bytes = b'{"c_info":{"name":"guest"}}\n', order: int = 0x01020304,
    flags: int = 3,
) -> bytes:  # fmt: skip
    """A file of xl around a stream of libxl."""
    return XL_MAGIC + struct.pack("<IIII", order, flags, 0, len(config)) + config + stream


def save(*records: bytes, version: int = 3, kind: int = 2) -> bytes:
    """A whole file of xl save, with the records that a real one has around its pages."""
    before = [record(STATIC_DATA_END)] if version == 3 else []
    after = [record(0xA, bytes(24)), record(9, bytes(100)), record(0x80000001, b"ignored")]
    inner = libxc(*before, *records, *after, record(END), version=version, kind=kind)
    return xl(libxl(inner, record(2, bytes(20)), record(3, b"QEMU!"), record(END)))


def libvirt(
    stream: bytes, *, version: int = 2, header: int = 64, xml: bytes = b"<domain/>\0"
) -> bytes:
    """What virsh save writes of a Xen guest, around a stream of libxl."""
    head = struct.pack("<16sII", b"libvirt-xml\n \0 \r", version, len(xml))
    return head.ljust(header, b"\0") + xml + stream


def section(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    """A section of a suspend image of XenServer."""
    return struct.pack("<QQ", kind, len(body) if length is None else length) + body


def suspend_image(*sections: bytes) -> bytes:
    """A suspend image of XenServer, as its disk has it: with zeros after the end."""
    return b"XenSavedDomv2-\n" + b"".join(sections) + section(0xFFFF) + bytes(100)


def memory(address: int, length: int) -> bytes:
    """What a guest has there whose pages are all as page() makes them."""
    first, end = address // PAGE, -(-(address + length) // PAGE)
    whole = b"".join(map(page, range(first, end)))
    return whole[address - first * PAGE :][:length]
