"""The ctypes loader: the same declarations without cffi."""

from __future__ import annotations

import ctypes
from functools import partial
from itertools import starmap
from typing import Any, cast

from .declarations import Library, Prototype, prototypes
from .interface import Argument, Function

_TYPES: dict[str, Any] = {
    "*": ctypes.c_void_p,
    "void": None,
    "int": ctypes.c_int,
    "unsigned": ctypes.c_uint,
    "long": ctypes.c_long,
    "unsigned long": ctypes.c_ulong,
    "size_t": ctypes.c_size_t,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "domid_t": ctypes.c_uint16,
    "ioservid_t": ctypes.c_uint16,
    "evtchn_port_t": ctypes.c_uint32,
    "xenevtchn_port_or_error_t": ctypes.c_int,
    "xentoollog_level": ctypes.c_int,
}


class CtypesLoader:
    """Binds through :class:`ctypes.CDLL`, which releases the interpreter lock during calls."""

    name = "ctypes"

    def open(self, library: Library, path: str) -> dict[str, Function]:
        """Load a library; see :class:`.interface.Loader`."""
        handle = ctypes.CDLL(path or None, use_errno=True)
        return {
            prototype.name: _bind(handle, prototype)
            for prototype in prototypes(library).values()
            if hasattr(handle, prototype.name)
        }


def _pointer(argument: Argument) -> object:
    """Return what a ``c_void_p`` parameter takes for an address, bytes or a writable buffer."""
    if argument is None or isinstance(argument, int | bytes):
        return argument
    # ctypes keeps the array, and it the buffer, until the call has returned.
    return (ctypes.c_char * memoryview(argument).nbytes).from_buffer(argument)


def _range(kind: str) -> tuple[int, int]:
    """Return the least and the greatest number that a type holds: ctypes would cut off silently."""
    bits = 8 * ctypes.sizeof(_TYPES[kind])
    signed = _TYPES[kind](-1).value < 0
    return (-1 << bits - 1, (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def cause_of(error: ctypes.ArgumentError) -> Exception:
    """Return the MemoryError or RecursionError that ctypes has turned into an ArgumentError."""
    for kind in (MemoryError, RecursionError):
        if kind.__name__ in str(error):
            return kind("ctypes could not convert an argument")
    return error


def _bind(handle: ctypes.CDLL, prototype: Prototype) -> Function:
    function = handle[prototype.name]
    kinds = prototype.parameters
    function.argtypes = [_TYPES[kind] for kind in kinds]
    function.restype = _TYPES[prototype.result]
    pointers = [position for position, kind in enumerate(kinds) if kind == "*"]
    numbers = [(position, *_range(kind)) for position, kind in enumerate(kinds) if kind != "*"]
    get_errno, set_errno = ctypes.get_errno, ctypes.set_errno

    def call(*arguments: Argument, result_out: list[int] | None = None) -> tuple[int, int]:
        values = list(arguments)
        for position in pointers:
            values[position] = _pointer(values[position])
        for position, least, greatest in numbers:
            if not least <= values[position] <= greatest:
                raise OverflowError(f"integer {values[position]} does not fit {kinds[position]!r}")
        set_errno(0)
        try:
            if result_out is not None:
                # All of it is C: no signal handler runs before the number is in the list.
                result_out.extend(starmap(function, (values,)))
                return result_out[-1] or 0, get_errno()
            return function(*values) or 0, get_errno()
        except ctypes.ArgumentError as error:
            raise cause_of(error) from error

    call.for_each = partial(map, function)  # type: ignore[attr-defined] # a function takes attributes
    return cast("Function", call)
