"""Volatility's symbol table of a Linux kernel (ISF), made of the types that drgn knows.

Volatility's own tool for this, dwarf2json, is not packaged by Debian or for Python.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final

from drgn import TypeKind, sizeof

KERNEL_MAP: Final = 0xFFFFFFFF80000000
VARIABLES: Final = ("init_task", "init_files", "init_mm", "linux_banner", "modules", "tk_core")
"""What Volatility reads with a type."""
_INTEGERS: Final = {TypeKind.INT: "int", TypeKind.BOOL: "bool", TypeKind.FLOAT: "float"}
_KINDS: Final = {TypeKind.STRUCT: "struct", TypeKind.UNION: "union"}

Json = dict[str, Any]


class SymbolTable:
    """The types and symbols of a kernel, as Volatility wants them.

    Args:
        program: drgn's, with the kernel's debugging information.
        offset: how far the kernel was moved (KASLR), which the table leaves out.
    """

    def __init__(self, program: Any, offset: int) -> None:  # noqa: ANN401 - drgn is optional
        self._program = program
        self._offset = offset
        self._base: Json = {"pointer": _base(8, "int"), "void": _base(0, "void")}
        self._structures: Json = {}
        self._enums: Json = {}
        self._open: list[tuple[str, Any]] = []
        self._names: set[str] = set()

    def to_json(self, structures: Sequence[str]) -> Json:
        """Return the table with some structures, and all that they refer to."""
        symbols: Json = {}
        for symbol in self._program.symbols():
            moved = self._offset if symbol.address >= KERNEL_MAP else 0
            symbols.setdefault(symbol.name, {"address": symbol.address - moved})
        for name in structures:
            try:
                self._describe(self._program.type(f"struct {name}"))
            except LookupError:
                continue  # of kernels of other times
        for name in VARIABLES:
            symbols[name]["type"] = self._describe(self._program[name].type_)
        banner = self._program["linux_banner"].string_() + b"\0"
        symbols["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
        while self._open:
            self._write(*self._open.pop())
        return {
            "metadata": {
                "format": "6.2.0",
                "producer": {"name": "xenmapcache-tests", "version": "0.1.0"},
                "linux": {"symbols": [], "types": []},
            },
            "base_types": self._base,
            "user_types": self._structures,
            "enums": self._enums,
            "symbols": symbols,
        }

    def _describe(self, kind: Any, alias: str = "") -> Json:  # noqa: ANN401 - drgn is optional
        """Return a reference to a type, and note that it has to be written."""
        match kind.kind:
            case TypeKind.TYPEDEF:
                return self._describe(kind.type, kind.name)
            case TypeKind.POINTER:
                return {"kind": "pointer", "subtype": self._describe(kind.type)}
            case TypeKind.ARRAY:
                subtype = self._describe(kind.type)
                return {"kind": "array", "count": kind.length or 0, "subtype": subtype}
            case TypeKind.FUNCTION:
                return {"kind": "function"}
            case TypeKind.VOID:
                return {"kind": "base", "name": "void"}
            case TypeKind.ENUM | TypeKind.STRUCT | TypeKind.UNION:
                name = kind.tag or alias or f"unnamed_{len(self._names):x}"
                if name not in self._names:
                    self._names.add(name)
                    self._open.append((name, self._complete(kind)))
                return {"kind": _KINDS.get(kind.kind, "enum"), "name": name}
        what = "char" if kind.size == 1 and kind.kind is TypeKind.INT else _INTEGERS[kind.kind]
        signed = kind.kind is TypeKind.INT and kind.is_signed
        self._base[kind.name] = _base(kind.size, what, signed=signed)
        return {"kind": "base", "name": kind.name}

    def _complete(self, kind: Any) -> Any:  # noqa: ANN401 - drgn is optional
        """Return a type with its members, if the kernel has them anywhere."""
        if kind.is_complete() or not kind.tag:
            return kind
        try:
            return self._program.type(kind.type_name())
        except LookupError:
            return kind

    def _write(self, name: str, kind: Any) -> None:  # noqa: ANN401 - drgn is optional
        if kind.kind is TypeKind.ENUM:
            if kind.is_complete():
                values = {each.name: each.value for each in kind.enumerators}
                base = self._describe(kind.type)["name"]
                self._enums[name] = {"size": sizeof(kind), "base": base, "constants": values}
            return
        fields: Json = {}
        complete = kind.is_complete()
        for number, member in enumerate(kind.members if complete else ()):
            offset, described = member.bit_offset // 8, self._describe(member.type)
            if member.bit_field_size:
                size = sizeof(member.type)
                offset -= offset % size
                described = {
                    "kind": "bitfield",
                    "bit_position": member.bit_offset - 8 * offset,
                    "bit_length": member.bit_field_size,
                    "type": described,
                }
            field = {"type": described, "offset": offset}
            fields[member.name or f"unnamed_field_{number}"] = (
                field if member.name else field | {"anonymous": True}
            )
        size = sizeof(kind) if complete else 0
        self._structures[name] = {"size": size, "kind": _KINDS[kind.kind], "fields": fields}


def _base(size: int, kind: str, *, signed: bool = False) -> Json:
    return {"size": size, "signed": signed, "kind": kind, "endian": "little"}
