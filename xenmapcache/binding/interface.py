"""What a loader of shared libraries provides, in types that all loaders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from .declarations import Library

Argument = Any
"""A number; an address as an int; None for NULL; bytes for a ``char *``; or a writable buffer."""


class Function(Protocol):
    """A C function. Takes :data:`Argument` values and returns ``(result, errno)``.

    Pointers are ints both ways, and ``errno`` is the one that this call left. A number that
    does not fit its C type raises OverflowError. The interpreter lock is released while the
    function runs.
    """

    for_each: Callable[[Iterable[int]], Iterator[object]]
    """Return an iterator that calls the function with each pointer, by C code alone.

    So no signal handler runs between the calls, and no RecursionError comes from Python code.
    """

    def __call__(
        self, *arguments: Argument, result_out: list[int] | None = None
    ) -> tuple[int, int]:
        """Call the function.

        Args:
            *arguments: what the C function takes.
            result_out: a list to which the result is appended before a signal handler can run.
                After Ctrl-C the caller finds there what the C function returned.
        """
        ...


class Loader(Protocol):
    """Opens shared libraries and makes their functions callable."""

    name: str

    def open(self, library: Library, path: str) -> dict[str, Function]:
        """Load a library.

        Args:
            library: what it declares.
            path: a SONAME or a path; empty for the process itself.

        Returns:
            The declared functions that the library exports.

        Raises:
            OSError: the dynamic linker could not load it.
        """
        ...
