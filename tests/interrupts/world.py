"""The objects of an operation, made again for each point, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, ClassVar, NamedTuple, TypeVar

from xenmapcache import MapCache
from xenmapcache.mapping import live_mappings

from .injector import Outcome

Result = TypeVar("Result")

THREAD_LIMIT = 10.0
"""Seconds for what another thread does in a moment if no lock is held."""
_PACKAGE = "xenmapcache"
_FINALIZERS = ("_unmap", "_finalize", "__del__", "sweep")
_BELLS = ("_bells",)
"""Where the package keeps locks that a thread sleeps at until another one releases them."""
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_HOLDERS = (*_LOCKS, dict, list, tuple, set, frozenset)
_KINDS: dict[type, bool] = {}
"""Whether objects of a type are locks, or may lead to one."""


class InjectedInterrupt(KeyboardInterrupt):
    """What a handler raises that wants to end the program."""


class InjectedError(KeyError, ValueError, TypeError):
    """What a handler raises that some ``except`` of the package could take for its own."""


class ChildLeaves(BaseException):
    """Ends a forked child: it leaves the operation as ``sys.exit()`` would."""


class HangError(Exception):
    """Another thread waits for something that never comes."""


class World:
    """Fresh state for one point.

    An operation acts on it, a handler calls one of its ``handle_`` methods in the middle, and
    then it finds out what is wrong. Subclasses say what there is.

    Attributes:
        problems: what was found wrong, in words.
        permitted: exceptions of the package that the operation may raise, by handler.
        fired: whether the handler has run.
        handled: which one that was.
        stack: the code of its frames when the handler ran, innermost first.
        children: processes that a handler has forked.
    """

    permitted: ClassVar[dict[str, tuple[type[BaseException], ...]]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.fired = False
        self.handled = ""
        self.stack: list[CodeType] = []
        self.children: list[int] = []
        self.result: Any = None

    # --- what handlers do -----------------------------------------------------------

    def handle(self, name: str) -> None:
        """Do what a handler of that name does."""
        self.fired = True
        self.handled = name
        self.stack = [frame.f_code for frame, _ in traceback.walk_stack(None)]
        if name == "interrupt":
            raise InjectedInterrupt
        if name == "error":
            raise InjectedError("injected")
        if name == "fork":
            self._fork()
            return
        try:
            getattr(self, f"handle_{name}")()
        except BaseException as error:
            if not isinstance(error, self.permitted.get(name, ())):
                self.problems.append(f"the handler's own {name} raised {error!r}")

    def _fork(self) -> None:
        pid = os.fork()
        if not pid:
            signal.alarm(10)
            raise ChildLeaves
        self.children.append(pid)

    def wait_for_children(self) -> None:
        """Wait for forked children: each must have left with status 0."""
        for pid in self.children:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                self.problems.append(f"the forked child ended with {status}")
        self.children.clear()

    # --- what must hold -----------------------------------------------------------

    def check(self, outcome: Outcome) -> None:
        """Find what is wrong while the exception that was raised is still kept."""

    def may_not_swallow(self, handler: str) -> bool:
        """Tell whether what a handler raises must come out of the operation.

        Out of a finalizer nothing can come.
        """
        return not any(code.co_name in _FINALIZERS for code in self.stack)

    def end(self) -> None:
        """Close everything, and find what is wrong then."""

    def problem(self, text: str) -> None:
        """Note what is wrong."""
        self.problems.append(text)

    def in_thread(self, what: str, work: Callable[[], Result]) -> Result | None:
        """Return what another thread returns; HangError if it does not end."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(THREAD_LIMIT)
        if thread.is_alive():
            self.problem(f"another thread hangs: {what}")
            raise HangError(what)
        if errors and not isinstance(errors[0], self.permitted.get("other thread", ())):
            self.problem(f"another thread's {what} raised {errors[0]!r}")
        return results[0] if results else None

    @contextlib.contextmanager
    def noting(self, what: str, *allowed: type[BaseException]) -> Iterator[None]:
        """Note what a step of the checks raises, other than what it may."""
        try:
            yield
        except HangError:
            raise
        except allowed:
            pass
        except BaseException as error:
            self.problem(f"{what} raised {error!r:.300}")

    def check_accounting(self, cache: MapCache) -> None:
        """Note what a closed cache counts as mapped; another thread may be about to unmap."""
        end = time.monotonic() + 0.5
        while True:
            gc.collect()
            stats = cache.stats()
            if not (stats.resident_bytes or stats.resident_buckets or stats.maps != stats.unmaps):
                return
            if time.monotonic() > end:
                break
            time.sleep(0.005)
        self.problem(
            f"accounting: after close resident_bytes is {stats.resident_bytes:#x}, maps - unmaps "
            f"{stats.maps - stats.unmaps}, resident_buckets {stats.resident_buckets}"
        )

    def check_locks(self, *roots: object, but: str = "no lock") -> None:
        """Note every lock that is held and can be reached from objects of the package."""
        end = time.monotonic() + 0.5
        while True:  # another thread, such as a vCPU's, may hold one for a moment
            held = [path for path in held_locks(*roots) if but not in path]
            if not held or time.monotonic() > end:
                break
            time.sleep(0.005)
        for path in held:
            self.problem(f"a lock is held: {path}")


@dataclass(frozen=True)
class Operation:
    """An operation of the package, as the table lists it.

    Attributes:
        name: ``subject.operation``.
        world: makes the state.
        act: the operation itself: only this is interrupted.
        handlers: names of the handlers that apply.
        prepare: what comes before, uninterrupted.
        again: does it a second time, which must complete the first; may add problems.
        check: looks at what is special to the operation, after ``again``.
        raises: exceptions of the package that ``act`` raises rightly.
    """

    name: str
    world: Callable[[Path], World]
    act: Callable[[Any], object]
    handlers: tuple[str, ...]
    prepare: Callable[[Any], object] | None = None
    again: Callable[[Any], object] | None = None
    check: Callable[[Any], object] | None = None
    raises: tuple[type[BaseException], ...] = ()


class Resources(NamedTuple):
    """What this process holds of the kernel's.

    Attributes:
        mappings: as the package counts them.
        ranges: lines of /proc/self/maps that show guest memory or a file of a test.
        descriptors: open files.
    """

    mappings: int
    ranges: int
    descriptors: int

    @classmethod
    def now(cls, folder: Path) -> Resources:
        """Return what is held at this moment."""
        marks = ("memfd:xenmapcache", "memfd:fake-xen", str(folder))
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        ranges = sum(
            any(mark in line for mark in marks) and ".so" not in line for line in text.splitlines()
        )
        return cls(live_mappings(), ranges, len(os.listdir("/proc/self/fd")))

    def more_than(self, before: Resources) -> Iterator[str]:
        """Yield what there is more of than before."""
        names = ("live mappings", "ranges in /proc/self/maps", "descriptors")
        for name, now, then in zip(names, self, before, strict=True):
            if now > then:
                yield f"{now - then} more {name}: leaked"


def settled(folder: Path, before: Resources) -> Resources:
    """Return what is held, once threads that are just ending have ended, or after a moment."""
    end = time.monotonic() + 3
    while True:
        gc.collect()
        now = Resources.now(folder)
        if not any(now.more_than(before)) or time.monotonic() > end:
            return now
        time.sleep(0.005)


def held_locks(*roots: object) -> Iterator[str]:
    """Yield the paths of locks that are held, from the roots through objects of the package."""
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [(type(root).__name__, root) for root in roots]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        held: Iterable[tuple[str, object]] = ()
        if isinstance(value, _LOCKS):
            if repr(value).startswith("<locked"):
                yield path
        elif isinstance(value, dict):
            held = ((f"[{key!r:.40}]", each) for key, each in _of_use(value.items()))
        elif isinstance(value, list | tuple | set | frozenset):
            held = (("[..]", each) for _, each in _of_use(("", each) for each in value))
        elif _is_ours(value):
            held = ((f".{name}", each) for name, each in _of_use(_attributes(value)))
            held = ((name, each) for name, each in held if name[1:] not in _BELLS)
        waiting += [(path + name, each) for name, each in held]


def _of_use(pairs: Iterable[tuple[Any, object]]) -> Iterator[tuple[Any, object]]:
    """Yield the pairs whose second is a lock, or may lead to one."""
    for name, each in list(pairs):
        kind = type(each)
        if kind not in _KINDS:
            _KINDS[kind] = isinstance(each, _HOLDERS) or _is_ours(each)
        if _KINDS[kind]:
            yield name, each


def _is_ours(value: object) -> bool:
    return not isinstance(value, type) and type(value).__module__.startswith(_PACKAGE)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__weakref__", "__dict__"):
                with contextlib.suppress(AttributeError):
                    yield name, getattr(value, name)


def module_state() -> list[object]:
    """Return the objects and locks that the package's modules keep for the whole process."""
    return [
        value
        for name in _modules(len(sys.modules))
        for variable in _variables(name, len(vars(sys.modules[name])))
        for value in [vars(sys.modules[name]).get(variable)]
        if isinstance(value, _LOCKS) or _is_ours(value)
    ]


# A forked child copies each page of which it touches an object: most objects are functions and
# classes. The sizes tell when there is more to look at.


@functools.cache
def _modules(_: int) -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == _PACKAGE]


@functools.cache
def _variables(module: str, _: int) -> list[str]:
    fixed = (type, FunctionType, BuiltinFunctionType, ModuleType, str, int)
    return [name for name, each in vars(sys.modules[module]).items() if not isinstance(each, fixed)]


def is_expected(error: BaseException, operation: Operation, handler: str, world: World) -> bool:
    """Tell whether an operation may raise that after that handler."""
    link: BaseException | None = error
    while link is not None:  # an argument's check may take it for an error of the argument
        if isinstance(link, InjectedInterrupt | InjectedError):
            return True
        link = link.__context__
    if handler in ("allocation", "depth"):
        if "can't allocate lock" in str(error) or "can't start new thread" in str(error):
            return True  # what CPython says for MemoryError there
        if any(name in str(error) for name in ("MemoryError", "RecursionError")):
            return True  # ctypes wraps them
        if isinstance(error, TypeError) and "PosixPath" in str(error):
            return True  # so does its conversion of paths
        if isinstance(error, SystemError) and handler == "allocation":
            return True  # CPython itself has lost its MemoryError
        low = (MemoryError, RecursionError)
        return isinstance(error, (*low, *operation.raises, *world.permitted.get(handler, ())))
    return isinstance(error, (*operation.raises, *world.permitted.get(handler, ())))
