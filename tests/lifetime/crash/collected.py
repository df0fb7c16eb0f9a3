"""The columns of the matrix in which the collector finalizes garbage that uses what is kept."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

from .holds import HeldIterator, Hold
from .world import World

Use = Callable[[], None]


class Cycle:
    """Garbage that uses what is kept in its ``__del__``."""

    def __init__(self, use: Use) -> None:
        self.use = use
        self.itself = self

    def __del__(self) -> None:
        self.use()


def in_del(use: Use) -> None:
    """An object that refers to itself."""
    Cycle(use)


def _user(use: Use, kept: list[object]) -> Generator[None]:
    kept.append(use)
    try:
        yield
    finally:
        use()


def in_generator(use: Use) -> None:
    """A generator that its own local variable refers to."""
    kept: list[object] = []
    generator = _user(use, kept)
    kept.append(generator)
    next(generator)


class _Never:
    """An operation that has not ended when the event loop is gone."""

    def __await__(self) -> Generator[None, None, None]:
        yield


async def _job(use: Use, kept: list[object], operation: Awaitable[Any]) -> None:
    kept.append(use)
    try:
        await operation
    finally:
        use()


def in_coroutine(use: Use) -> None:
    """A coroutine that waits, and that its own local variable refers to."""
    kept: list[object] = []
    job = _job(use, kept, _Never())
    kept.append(job)
    job.send(None)


def in_exception(use: Use) -> None:
    """An exception that a variable of its own frame keeps, together with a generator."""
    generator = _user(use, [])
    next(generator)
    try:
        raise ValueError("kept")
    except ValueError as error:
        kept = error
    assert kept.__traceback__ is not None


COLLECTED: dict[str, Callable[[Use], None]] = {
    "collected: __del__ uses it": in_del,
    "collected: a generator's finally uses it": in_generator,
    "collected: a coroutine uses it": in_coroutine,
    "collected: an exception in its own frame": in_exception,
}


def _use(hold: Hold, seen: list[str]) -> None:
    seen.append("used")
    try:
        said = hold.use()
    finally:
        hold.drop()
    if isinstance(hold, HeldIterator) and said == "no match":
        said = "bytes"  # the collector may have closed the generator, garbage itself, before
    seen.append(said)


def collect(world: World, column: str, holds: list[Hold]) -> str:
    """Let garbage keep what ``holds`` has, collect it, and return what it has seen.

    After the invalidation only the garbage keeps the memory.
    """
    seen: list[str] = []

    use = partial(_use, holds.pop(), seen)
    gc.disable()  # until the garbage is complete
    COLLECTED[column](use)
    del use
    world.cache.invalidate()
    assert seen == []
    gc.enable()
    gc.collect()
    used, said = seen
    assert used == "used"
    return said
