"""The image guard: the thread that answers when the kernel wants a file lease back."""

# Theory of operation
#
# What a file lease is, its states, and rules 1 to 5 are in `filelease.py`.
#
# The guard cannot be held up
#   6. It takes no lock that a frame of the user's code can hold: a signal handler, which may
#      truncate the file itself, runs on top of such frames. `_election` is held only by threads
#      that want to be the guard, in which no signal handler runs.
#   7. It runs no foreign code, and imports nothing. Log lines are written by another thread, after
#      the answer (latelog.py): a logging filter may raise, wait for a lock, or never return.
#   8. It continues after every exception. What it could not do it tries again 20 ms later, until
#      the kernel's patience ends (fs.lease-break-time).
#   9. Should the thread have ended all the same, the next map starts another one, which first
#      takes over all file leases, and answers what the dead one was sent.

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
import weakref

from ..mapping import LiveMapping, live_records
from .copies import put_copy_over
from .filelease import SIGNAL, FileLease, MappedPart, MappedRange
from .latelog import LateLog

_RETRY_S = 0.02

_Ranges = list[tuple[LiveMapping, MappedRange]]


class FileLeaseThread:
    """The image guard: the one thread that the kernel signals when a file lease breaks.

    Attributes:
        leases: weak references to the file leases of all open files.
        log: for what it has to say.
    """

    name = "xenmapcache image guard"

    def __init__(self) -> None:
        self.leases: set[weakref.ref[FileLease]] = set()
        self.reset()

    def reset(self) -> None:
        """Begin again: in a forked child, which has neither the thread nor its files."""
        self.leases.clear()
        self._election = threading.Lock()
        self._elected: tuple[threading.Thread, int] | None = None
        self.log = LateLog("xenmapcache file lease report")
        self._last_failure = ""

    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        elected = self._elected
        return elected is not None and elected[0].is_alive()

    def start(self) -> int:
        """Return the kernel's id of the thread, which is started if none runs.

        Raises:
            OSError: no thread can be started.
        """
        for _ in range(3):
            elected = self._elected
            if elected is not None and elected[0].is_alive():
                return elected[1]
            self._start_candidate()
        raise OSError(errno.ESRCH, f"the thread {self.name!r} ends at once")

    def _start_candidate(self) -> None:
        """Start a thread that becomes the guard, unless another one has become it first."""
        election = self._election
        ready = threading.Lock()
        ready.acquire()
        thread = threading.Thread(target=self._run, args=(ready,), name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not str(error).startswith("can't"):  # a signal handler has raised it
                raise
            raise OSError(errno.ENOMEM, str(error)) from None
        while not ready.acquire(timeout=0.1):
            if self._election is not election:
                raise OSError(errno.ECHILD, "a signal handler forked while a thread started")

    def _run(self, ready: threading.Lock) -> None:
        # All signals wait for other threads from here on. So far this thread had the signal mask of
        # the one that has started it, and could be given no signal which that one could not.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with self._election:
                if self.is_alive():
                    return
                self._elected = threading.current_thread(), threading.get_native_id()
                self._take_over()
        finally:
            ready.release()
        del ready
        again = True  # what was signalled to a thread that has ended
        while True:
            try:
                self._serve(again)
            except BaseException as error:  # a MemoryError, or what another thread has thrown in
                again = True
                self._report_failure(error)

    def _take_over(self) -> None:
        """Let the kernel signal this thread for the file leases of one that has ended."""
        for reference in tuple(self.leases):
            lease = reference()
            if lease is not None and (lease.asked or lease.held):
                with contextlib.suppress(OSError, ValueError):  # it has been closed
                    lease.give_to(threading.get_native_id())

    def _serve(self, again: bool) -> None:
        """Answer lease breaks, for ever."""
        assert SIGNAL is not None  # noqa: S101 - or no file lease was taken
        signals = {SIGNAL}
        while True:
            if again:
                signal.sigtimedwait(signals, _RETRY_S)
            else:
                signal.sigwaitinfo(signals)
            again = not self.answer_all()

    def answer_all(self) -> bool:
        """Answer all lease breaks; return False if one has to be tried again."""
        breaks, complete = self._breaks()
        if breaks:
            for record in live_records():
                mapped = record.keeps
                if isinstance(mapped, MappedRange) and mapped.lease in breaks:
                    breaks[mapped.lease].append((record, mapped))
        for lease, ranges in breaks.items():
            try:
                self._answer(lease, ranges)
            except Exception as error:
                complete = False
                self._report_failure(error)
        return complete

    def _breaks(self) -> tuple[dict[FileLease, _Ranges], bool]:
        """Return the file leases that the kernel wants back, and whether all could be asked for."""
        breaks: dict[FileLease, _Ranges] = {}
        complete = True
        for reference in tuple(self.leases):
            lease = reference()
            if lease is None:
                self.leases.discard(reference)
            elif lease.asked or lease.held:
                try:
                    if lease.is_breaking():
                        breaks[lease] = []
                        lease.ended = True  # before the look at the table, see rule 1
                except Exception as error:
                    complete = False
                    self._report_failure(error)
        return breaks, complete

    def _answer(self, lease: FileLease, ranges: _Ranges) -> None:
        """Replace all ranges of a file that others see by copies, then end its file lease."""
        failures = []
        for record, mapped in ranges:
            if mapped.claim():
                mapped.lease = None
                continue
            memory = record()  # nobody unmaps it until `del memory`, see rule 2
            if memory is not None:
                try:
                    failures += [_copy(lease, part, record) for part in mapped.parts(record)]
                finally:
                    del memory
            mapped.lease = None
        if not lease.end() and not lease.held:
            lease.ended = False  # it was not broken: another thread is just asking for it
        lost = list(filter(None, failures))
        if lost:
            text = "%s: %d of %d mapped ranges could not be copied, and show zeros: %s"
            self.log.report(logging.CRITICAL, text, lease.path, len(lost), len(failures), lost[-1])
        elif failures:
            text = "%s is opened for writing: %d mapped ranges are copied now, others are read"
            self.log.report(logging.INFO, text, lease.path, len(failures))

    def _report_failure(self, error: BaseException) -> None:
        """Report that a file could not be protected; the same failure once."""
        with contextlib.suppress(MemoryError):
            text = f"{type(error).__name__}: {error}"
            if text != self._last_failure:
                self._last_failure = text
                self.log.report(logging.CRITICAL, "a lease break is not answered yet: %s", text)

    def forget_parent(self) -> None:
        """In a forked child: close all files."""
        for reference in tuple(self.leases):
            lease = reference()
            if lease is not None:
                lease.forget_parent()
        self.reset()


def _copy(lease: FileLease, part: MappedPart, record: LiveMapping) -> str:
    fd = lease.file.fileno()
    address = record.address + part.position
    return put_copy_over(address, part.length, fd, part.offset, lease.size, lease.change)


image_guard = FileLeaseThread()
os.register_at_fork(after_in_child=image_guard.forget_parent)
