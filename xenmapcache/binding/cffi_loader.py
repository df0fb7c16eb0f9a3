"""The cffi loader: out-of-line ABI mode, so no compiler and no Xen where it is installed."""

from __future__ import annotations

from functools import partial
from itertools import starmap
from typing import Any

from ._cffi import ffi
from .declarations import Library, Prototype, prototypes
from .loader import Argument, Function

_cast, _from_buffer = ffi.cast, ffi.from_buffer
_address = partial(_cast, "uintptr_t")

# Never emptied: a function does not keep its library loaded, and one that is
# unloaded crashes whoever still calls it. ctypes never unloads either.
_libraries: dict[str, Any] = {}


class CffiLoader:
    """Binds through the generated module ``_cffi``; calls release the interpreter lock."""

    name = "cffi"

    def open(self, library: Library, path: str) -> dict[str, Function]:
        """Load a library; see :class:`.loader.Loader`."""
        handle = _libraries.get(path)
        if handle is None:
            handle = _libraries[path] = ffi.dlopen(path or None)
        functions = {}
        for prototype in prototypes(library).values():
            try:
                function = getattr(handle, prototype.name)
            except ffi.error:  # no such symbol
                continue
            functions[prototype.name] = _bind(function, prototype)
        return functions


def _pointer(argument: Argument) -> Argument:
    """Return what cffi takes for ``void *``: NULL, or where bytes or a writable buffer are."""
    return ffi.NULL if argument is None else _from_buffer(argument)


def _bind(function: Argument, prototype: Prototype) -> Function:
    types = ffi.typeof(function)
    pointers = [
        (position, types.args[position])
        for position, kind in enumerate(prototype.parameters)
        if kind == "*"
    ]
    returns_pointer = prototype.result == "*"

    def call(*arguments: Argument, left: list[int] | None = None) -> tuple[int, int]:
        values = list(arguments)
        held = []  # a cast does not keep the buffer behind it alive
        for position, kind in pointers:
            pointer = values[position]
            if not isinstance(pointer, int):
                pointer = _pointer(pointer)
                held.append(pointer)
            values[position] = _cast(kind, pointer)
        ffi.errno = 0
        if left is not None:
            # All of it is C: no signal handler runs before the number is in the list.
            left.extend(map(int, map(_address, starmap(function, (values,)))))
            return left[-1], ffi.errno
        result = function(*values)
        errno = ffi.errno
        if returns_pointer:
            result = int(_cast("uintptr_t", result))
        return result or 0, errno

    return call
