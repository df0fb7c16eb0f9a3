"""The cffi loader: out-of-line ABI mode, so no compiler and no Xen where it is installed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import starmap
from typing import Any, cast

from ._cffi import ffi
from .declarations import Library, Prototype, prototypes
from .interface import Argument, Function

_cast, _from_buffer = ffi.cast, ffi.from_buffer
_address = partial(_cast, "uintptr_t")

# Never emptied: a function does not keep its library loaded, and one that is
# unloaded crashes a thread that still calls it. ctypes never unloads either.
_libraries: dict[str, Any] = {}


class CffiLoader:
    """Binds through the generated module ``_cffi``; calls release the interpreter lock."""

    name = "cffi"

    def open(self, library: Library, path: str) -> dict[str, Function]:
        """Load a library; see :class:`.interface.Loader`."""
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

    def call(*arguments: Argument, result_out: list[int] | None = None) -> tuple[int, int]:
        values = list(arguments)
        held = []  # a cast does not keep its buffer alive
        for position, kind in pointers:
            pointer = values[position]
            if not isinstance(pointer, int):
                pointer = _pointer(pointer)
                held.append(pointer)
            values[position] = _cast(kind, pointer)
        ffi.errno = 0
        if result_out is not None:
            # Near the recursion limit the conversion must fail before the call, not after it.
            deque(map(int, map(_address, (ffi.NULL,))), 0)
            # All of it is C: no signal handler runs before the number is in the list.
            result_out.extend(map(int, map(_address, starmap(function, (values,)))))
            return result_out[-1], ffi.errno
        result = function(*values)
        errno = ffi.errno
        if returns_pointer:
            result = int(_cast("uintptr_t", result))
        return result or 0, errno

    def for_each(addresses: Iterable[int]) -> Iterator[object]:
        return map(function, map(partial(_cast, types.args[0]), addresses))

    call.for_each = for_each  # type: ignore[attr-defined] # a function takes attributes
    return cast("Function", call)
