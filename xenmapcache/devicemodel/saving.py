"""What a server does around ``xl save``: transfers end, and none begins until it resumes."""

from __future__ import annotations

from ..cache import MapCache
from .gate import Gate
from .runtime import Runtime


def suspend(runtime: Runtime, gate: Gate, cache: MapCache) -> None:
    """Call the callbacks, and shut the gate; see :meth:`IoreqServer.suspend`."""
    runtime.check_sync("suspend")
    connection = runtime.open_connection()
    with runtime.lock:  # no INVALIDATE waits now for what will wait at the gate
        connection.calls.quiesce()
        gate.shut(0)
    runtime.deliver()
    timeout = runtime.quiesce_timeout
    if busy := gate.shut(timeout):
        raise TimeoutError(
            f"{runtime!r}: {busy} transfers are still under way after {timeout} s; "
            "call resume(), or wait and call suspend() again"
        )
    cache.invalidate()


def resume(runtime: Runtime, gate: Gate, cache: MapCache) -> None:
    """Open the gate; see :meth:`IoreqServer.resume`."""
    with runtime.lock:  # not in the middle of an INVALIDATE
        cache.invalidate()
        gate.open()
