"""Operations of files of guest memory: what is mapped, and the thread that guards it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from xenmapcache import ClosedError, MapCache, open_backend
from xenmapcache.errors import CorruptImageError
from xenmapcache.files.image import ImageFile

from .caches import IMAGE, PAGE
from .injector import Outcome
from .world import Operation, World

TRUNCATION_LIMIT: Final = 8.0
"""Seconds for a truncation. If nobody ends the kernel's read lease, it waits for 45."""


class ImageWorld(World):
    """A flat image of 32 pages, opened, and a cache with room for four, or for more."""

    permitted: ClassVar = {
        "close": (ClosedError,),
        "truncate": (CorruptImageError,),
        "other thread": (ClosedError, CorruptImageError),
    }

    def __init__(self, folder: Path, room: int = 4) -> None:
        super().__init__(folder)
        self.room = room * PAGE
        self.path = folder / "flat.img"
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.path.write_bytes(IMAGE)
        os.utime(self.path, (1, 1))  # or opening waits for a tick of the file's clock
        self.backend: Any = None
        self.cache: Any = None
        self.truncated = False
        self.closed = False

    def open(self) -> None:
        """Open it, as a user does."""
        self.backend = open_backend("raw", path=str(self.path))
        self.cache = MapCache(self.backend, bucket_shift=12, max_resident=self.room)

    # --- handlers ---------------------------------------------------------------------

    def handle_read(self) -> None:
        """Read other pages."""
        if self.cache is not None:
            with contextlib.suppress(*((ClosedError,) if self.closed else ())):
                for page in (3, 9):
                    if self.cache.read(page * PAGE, 8) != IMAGE[page * PAGE : page * PAGE + 8]:
                        self.problem("the handler read wrong bytes")

    def handle_evict(self) -> None:
        """Read so much that everything that can be evicted is."""
        if self.cache is not None:
            with contextlib.suppress(*((ClosedError,) if self.closed else ())):
                for page in range(20, 26):
                    self.cache.read(page * PAGE, 8)

    def handle_invalidate(self) -> None:
        """Let all mappings go."""
        if self.cache is not None:
            self.cache.invalidate()

    def handle_close(self) -> None:
        """Close cache and file."""
        self.closed = True
        if self.cache is not None:
            self.cache.close(force=True)
        if self.backend is not None:
            self.backend.close()

    def handle_truncate(self) -> None:
        """Truncate the file: the kernel waits until nobody maps it."""
        self.truncated = True
        self.truncate("the handler")

    def truncate(self, who: str) -> None:
        """Truncate the file, in a time in which the guard can answer."""
        started = time.monotonic()
        os.truncate(self.path, 0)
        seconds = time.monotonic() - started
        if seconds > TRUNCATION_LIMIT:
            self.problem(f"a truncation by {who} took {seconds:.1f} s: nobody answers the kernel")

    # --- checks -------------------------------------------------------------------------

    def check(self, outcome: Outcome) -> None:
        """Find held locks and a guard that no longer answers."""
        self.check_locks(self.cache, self.backend)
        self.in_thread("read of the image", self.look)

    def look(self) -> None:
        """Read a page; a truncated file is an error then, and never a signal."""
        if self.cache is None:
            return
        data = self.cache.read(5 * PAGE, 8)
        if data != IMAGE[5 * PAGE : 5 * PAGE + 8]:
            self.problem(f"another thread read {data!r}")

    def end(self) -> None:
        """Truncate the file under what is mapped, look, and close."""
        if self.cache is not None and not self.closed:
            self.in_thread("truncation", lambda: self.truncate("another thread"))
            with self.noting("a read after the truncation", CorruptImageError):
                for page in (30, 31):  # which nobody has mapped
                    self.cache.read(page * PAGE, 8)
                if not self.truncated:
                    self.problem("a truncated file is read without an error")
        self.result = None
        for each in (self.cache, self.backend):
            with self.noting("close"):
                if each is not None:
                    each.close()
        if self.cache is not None:
            self.check_accounting(self.cache)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def opened(world: ImageWorld) -> None:
    """Have it open."""
    world.open()


def filled(world: ImageWorld) -> None:
    """Have it open, and four pages mapped."""
    world.open()
    for page in range(4):
        world.cache.read(page * PAGE, 8)


def viewed(world: ImageWorld) -> None:
    """Hold a view of a page that is no longer in the cache."""
    world.open()
    world.result = next(world.cache.views(PAGE, 8))
    world.cache.invalidate()


def read(world: ImageWorld) -> None:
    """Read a page that has to be mapped."""
    data = world.cache.read(PAGE, 8)
    if data != IMAGE[PAGE : PAGE + 8]:
        world.problem(f"read returned {data!r}")


def read_evicting(world: ImageWorld) -> None:
    """Read pages that have to be mapped, in place of others."""
    for page in (6, 7):
        data = world.cache.read(page * PAGE, 8)
        if data != IMAGE[page * PAGE : page * PAGE + 8]:
            world.problem(f"read returned {data!r}")


def take_window(world: ImageWorld) -> None:
    """Take a window, of which the first part is mapped; a page after the end is zeros."""
    world.result = world.cache.window(8 * PAGE, 25 * PAGE)


def take_window_again(world: ImageWorld) -> None:
    """Look at it, release it, and take another one, as if nothing had been."""
    again = not world.closed and not world.truncated
    for take in (False, True)[: 1 + again]:
        if take:
            take_window(world)
        lease = world.result
        if lease is not None and not lease.released:
            if lease.view != IMAGE[8 * PAGE :] + bytes(PAGE):
                world.problem("the window shows other bytes")
            lease.release()
    world.result = None


def drop(world: ImageWorld) -> None:
    """Let the view go."""
    world.result = None


def close(world: ImageWorld) -> None:
    """Close the file, whose pages are mapped."""
    world.closed = True
    world.backend.close()


def reread(world: ImageWorld) -> None:
    """Read it, as if nothing had been."""
    if not world.closed and not world.truncated:
        read(world)


def image_file(world: ImageWorld) -> ImageFile:
    """Return the ImageFile of the backend."""
    file: ImageFile = world.backend._file
    return file


def open_again(world: ImageWorld) -> None:
    """Open it unless it is open."""
    if world.cache is None and not world.truncated:
        world.open()


HANDLERS: Final = ("interrupt", "error", "read", "evict", "invalidate", "close", "fork", "truncate")
ALL: Final = (*HANDLERS, "allocation", "depth")


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = opened,
    again: Callable[[Any], object] | None = reread,
    **more: Any,  # noqa: ANN401 - fields of Operation
) -> Operation:
    """Return a row of the table."""
    more = {"world": ImageWorld, "handlers": ALL, **more}
    return Operation(name, act=act, prepare=prepare, again=again, **more)


OPERATIONS: Final = (
    operation(
        "image.open",
        opened,
        None,
        open_again,
        handlers=("interrupt", "error", "fork", "truncate", "allocation", "depth"),
    ),
    operation("image.map", read),
    operation("image.read", lambda w: image_file(w).read(PAGE, 64)),
    operation(
        "image.read_into", lambda w: image_file(w).read_into(PAGE, memoryview(bytearray(64)))
    ),
    operation("image.check", lambda w: image_file(w).check(), filled),
    operation("image.evict", read_evicting, filled),
    operation("image.invalidate", lambda w: w.cache.invalidate(), filled),
    operation("image.drop", drop, viewed),
    operation(
        "image.window",
        take_window,
        opened,
        take_window_again,
        world=partial(ImageWorld, room=64),
    ),
    operation("image.close", close, filled, close),
)
