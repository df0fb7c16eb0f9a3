"""Makes a signal, a failed allocation or too deep a stack happen at the n-th point of a call."""

from __future__ import annotations

import gc
import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Final, NamedTuple

SOURCE: Final = Path(__file__).with_name("inject.c")
SIGNAL: Final = signal.SIGUSR1
COUNTED: Final = ("/xenmapcache/", "/contextlib.py", "/threading.py", "/weakref.py")
"""Parts of the names of the files whose bytecodes are points."""
_FLAGS: Final = ("-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
DEPTHS: Final = 120
"""How many free frames are tried before the recursion limit, from none."""
PASSES: Final = 3
"""How many of the first, and of the last, passes through a loop are interrupted.

A loop over the lines of ``/proc/self/maps`` was 16,000 of the 18,500 bytecodes of a ``replace``."""


class MissingError(Exception):
    """This machine cannot build the injector; the text says why."""


class Outcome(NamedTuple):
    """What became of a call.

    Attributes:
        fired: whether the point was reached. If not, all points have been tried.
        where: ``file:line in function`` of the point.
        error: what the call raised.
    """

    fired: bool
    where: str
    error: BaseException | None


def build(folder: Path) -> Path:
    """Build the extension module for this Python into a folder, once, and return its file."""
    target = folder / f"_inject{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if target.exists() and target.stat().st_mtime_ns >= SOURCE.stat().st_mtime_ns:
        return target
    compiler = shutil.which("gcc")
    if compiler is None:
        raise MissingError("gcc is not installed (Debian: apt install gcc libc6-dev)")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise MissingError(f"{include} has no Python.h (Debian: apt install python3-dev)")
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{target.name}.new"
    command = [compiler, *_FLAGS, f"-I{include}", "-o", str(new), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "stdlib.h: No such file" in done.stderr:
        raise MissingError("the C library's headers are missing (Debian: apt install libc6-dev)")
    assert done.returncode == 0, done.stderr
    new.rename(target)
    return target


class Injector:
    """The built extension module.

    Args:
        built: its file, as :func:`build` returns it.

    Attributes:
        unraisable: what finalizers have raised since it was last cleared. CPython prints such an
            exception and continues.
    """

    def __init__(self, built: Path) -> None:
        spec = importlib.util.spec_from_file_location("_inject", built)
        assert spec is not None
        assert spec.loader is not None
        self._c: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._c)
        self.unraisable: list[str] = []
        sys.unraisablehook = self._note_unraisable
        # CPython 3.12 has events for bytecodes only if some frame has asked for them before.
        sys._getframe().f_trace_opcodes = True
        self._c.arm(COUNTED, -1, SIGNAL)
        self._c.disarm()

    def _note_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        self.unraisable.append(f"{unraisable.exc_value!r} in {unraisable.object!r:.80}")

    def signal(self, act: Callable[[], object], handler: Callable[[], None], point: int) -> Outcome:
        """Call ``act``, and let a signal's handler run at a bytecode; -1 for never."""
        signal.signal(SIGNAL, lambda *_: handler())
        error: BaseException | None = None
        try:
            self._c.arm(COUNTED, point, SIGNAL)
            act()
        except BaseException as raised:
            error = raised
        try:
            _look_at_signals()
        except BaseException as raised:
            error = raised
        _, fired, where = self._c.disarm()
        try:
            return Outcome(fired, where, error)
        finally:
            del error  # its traceback has this frame: a cycle

    def points(self, act: Callable[[], object]) -> list[int]:
        """Call ``act`` and return the points at which a signal is handled differently.

        Between two looks of the interpreter for signals there are some ten bytecodes. A signal at
        any of them is handled at the second look: one of them will do. Of the passes through a
        loop, at the same places of all frames, the first and the last ones will do.
        """
        begun = 0  # after this bytecode the present look was the next one
        places: dict[tuple[object, ...], list[int]] = {}

        def look(_: int, frame: FrameType | None) -> None:
            nonlocal begun
            places.setdefault(_place(frame), []).append(begun)
            begun = self._c.again()

        signal.signal(SIGNAL, look)
        self._c.arm(COUNTED, 0, SIGNAL)
        try:
            act()
            _look_at_signals()
        finally:
            count, _, _ = self._c.disarm()
        found = {
            point for passes in places.values() for point in passes[:PASSES] + passes[-PASSES:]
        }
        return sorted(point for point in found if point < count)

    def allocation(self, act: Callable[[], object], point: int, length: int = 1) -> Outcome:
        """Call ``act``, and let ``length`` allocations from a number on fail."""
        error: BaseException | None = None
        self._c.fail_allocations(point, length)
        try:
            act()
        except BaseException as raised:
            error = raised
        _, fired = self._c.restore_allocations()
        try:
            return Outcome(fired, _innermost(error), error)
        finally:
            del error

    def count_allocations(self, act: Callable[[], object]) -> int:
        """Call ``act`` and return how many allocations it makes in this thread."""
        self._c.fail_allocations(-1, 0)
        try:
            act()
        finally:
            count: int = self._c.restore_allocations()[0]
        return count

    def depth(self, act: Callable[[], object], point: int) -> Outcome:
        """Call ``act`` with room for just ``point`` more frames below the recursion limit."""
        error: BaseException | None = None
        if point >= DEPTHS:
            return Outcome(False, "", None)
        try:
            _descend(sys.getrecursionlimit() - _height() - point - 1, act)
        except BaseException as raised:
            error = raised
        where = f"{point} free frames: {_innermost(error)}"
        try:
            return Outcome(True, where, error)
        finally:
            del error


def _look_at_signals() -> None:
    """Give the interpreter a point at which it handles a signal that came last of all."""
    for _ in range(3):
        len("")


def _place(frame: FrameType | None) -> tuple[object, ...]:
    """Return where a frame, and each of those below it, is."""
    place: list[object] = []
    while frame is not None:
        place += (frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return tuple(place)


def _height() -> int:
    frame: FrameType | None = sys._getframe(1)
    height = 0
    while frame is not None:
        height += 1
        frame = frame.f_back
    return height


def _descend(frames: int, act: Callable[[], object]) -> None:
    if frames > 0:
        _descend(frames - 1, act)
    else:
        act()


def _innermost(error: BaseException | None) -> str:
    if error is None:
        return "nothing was raised"
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{frames[0].filename}:{frames[0].lineno} in {frames[0].name}" if frames else "C"


def quiet() -> None:
    """Keep the log, and what exists so far, out of the way: each point is as the one before."""
    logging.getLogger("xenmapcache").addHandler(logging.NullHandler())
    logging.getLogger("xenmapcache").propagate = False
    gc.collect()
    gc.freeze()
