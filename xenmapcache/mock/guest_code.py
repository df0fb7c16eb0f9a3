"""Code of a mock guest that runs on one of its vCPUs, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from .vcpu import HasVcpus, Vcpu, running_vcpu

T = TypeVar("T")
P = ParamSpec("P")


Uncollected = dict["GuestCode[Any]", None]
"""Code whose exception nobody was given yet."""


class GuestCode(Generic[T]):
    """A function that runs as code of a guest. Made by :meth:`.MockDomain.spawn`.

    Attributes:
        vcpu: the vCPU that it runs on.
        error: what it raised, or None.

    Synchronization: any threads.
    """

    def __init__(
        self, vcpu: Vcpu, function: Callable[[], T], name: str, uncollected: Uncollected
    ) -> None:
        self.vcpu = vcpu
        self._name = name
        self._uncollected = uncollected
        self._values: list[T] = []
        self.error: BaseException | None = None
        # A daemon, because code that does not end must not keep the interpreter from its end.
        self._thread = threading.Thread(
            target=self._run, args=(function,), name=f"vcpu{vcpu.number}:{name}", daemon=True
        )
        uncollected[self] = None
        self._thread.start()

    def __repr__(self) -> str:
        state = "running" if self._thread.is_alive() else "failed" if self.error else "done"
        return f"<GuestCode {self._name} on {self.vcpu!r}, {state}>"

    def _run(self, function: Callable[[], T]) -> None:
        running_vcpu.set(self.vcpu)
        try:
            self._values.append(function())
        except BaseException as error:
            self.error = error  # result() raises it, SystemExit too

    def result(self, timeout: float = 30.0) -> T:
        """Wait until the function has ended, and return what it returned.

        Args:
            timeout: in seconds.

        Raises:
            TimeoutError: it still runs.
            BaseException: what the function raised.
        """
        self.wait(timeout)
        self._uncollected.pop(self, None)
        if self.error is not None:
            raise self.error
        return self._values[0]

    def wait(self, timeout: float) -> None:
        """Wait until the function has ended.

        Raises:
            TimeoutError: it still runs.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self!r} has not ended in {timeout} s")


class RunsCode(HasVcpus):
    """A guest that runs functions as its own code.

    Synchronization: any threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uncollected: Uncollected = {}

    def spawn(
        self, vcpu: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> GuestCode[T]:
        """Run ``function(*args, **kwargs)`` as the guest's code on a vCPU, in a thread.

        In that thread the vCPU is the default of ``vcpu=``, so ``guest.port_in(0x700)`` runs on it.
        The exception that ends the function is raised by ``result()`` of what this returns, or by
        :meth:`join`. The pytest fixture ``mock_domain`` calls ``join`` after the test.

        Args:
            vcpu: its number.
            function: what the guest does.
            args: its arguments.
            kwargs: its keyword arguments.

        Raises:
            ValueError: there is no such vCPU.
        """
        name = getattr(function, "__name__", repr(function))
        work = partial(function, *args, **kwargs)
        return GuestCode(self.vcpu_at(vcpu), work, name, self._uncollected)

    def join(self, timeout: float = 30.0) -> None:
        """Wait until all code has ended that was spawned and whose result was not asked for.

        Args:
            timeout: for all of it, in seconds.

        Raises:
            TimeoutError: some still runs.
            BaseException: what the code raised; a group, if several pieces of code raised.
        """
        end = time.monotonic() + timeout
        errors: list[BaseException] = []
        for code in list(self._uncollected):
            try:
                code.wait(max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                errors.append(error)
            if code.error is not None:
                errors.append(code.error)
            self._uncollected.pop(code, None)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup("code of the guest failed", errors)
