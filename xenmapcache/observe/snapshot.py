"""One answer of a monitor: what the caches and servers of a process hold at one moment.

It travels as one line of JSON. Times are in ns on the events' clock: see :mod:`xenmapcache.events`.
Texts are as the process has them: escape them before you print them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ..cache.info import CacheStats

VERSION: Final = 1
"""Of the form. A reader reads answers of this version, and ignores keys that it does not know."""
MAX_BYTES: Final = 1 << 22
"""How long an answer may be. What a monitor sends is never longer."""
MAX_TEXT: Final = 1000
"""How long a text may be, in characters."""
MAX_LEASES: Final = 10_000
"""How many leases may be in an answer."""
MAX_FRAMES: Final = 64
"""How many lines of its origin a lease may have."""
MAX_WATCHED: Final = 1000
"""How many caches, and how many servers, may be in an answer."""
MAX_JOBS: Final = 64
"""How many requests inside of each other one server may have."""

_LIMIT: Final = 1 << 64
_SHOWN = 40


class SnapshotError(ValueError):
    """An answer is damaged, or hostile; the message names the key and says what is wrong."""


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A lease that is held.

    Attributes:
        id: unique in its process.
        owner: the name that it was given.
        kind: ``device``, ``dma`` or ``window``.
        start, end: the guest's addresses; half-open.
        direction: ``to-device``, ``from-device`` or ``bidirectional``; None if it is not DMA.
        taken_ns: when it was taken.
        stale: whether an invalidation has passed since (not of a device), or its memory was lost.
        thread: the name of the thread that took it.
        origin: the stack where it was taken, innermost last, if the cache records that.
    """

    id: int
    owner: str
    kind: str
    start: int
    end: int
    direction: str | None
    taken_ns: int
    stale: bool
    thread: str
    origin: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class CacheState:
    """A cache.

    Attributes:
        name: what it is a cache of.
        domid: the domain's number; None of a file.
        closed: whether it was closed.
        stats: as of :meth:`MapCache.stats`, but read one after the other, without the cache's lock;
            None if they could not be read.
        leases: those that are held, oldest first.
        leases_omitted: how many more are held.
        incomplete: whether a part could not be read, because other threads change it all the time.
    """

    name: str
    domid: int | None
    closed: bool
    stats: CacheStats | None
    leases: tuple[LeaseState, ...]
    leases_omitted: int
    incomplete: bool


@dataclass(frozen=True, slots=True)
class CurrentRequest:
    """What a server does at this moment.

    Attributes:
        vcpu: that waits; None of a buffered request, or if there is no request.
        kind: ``port``, ``mmio``, ``pci_config``, ``timeoffset``, ``invalidate``, or ``type N`` of
            one that this package does not know; ``callbacks`` if there is no request: those of
            :meth:`IoreqServer.on_quiesce` at the end, or handlers of logging.
        is_read: whether data goes to the guest; None if there is no request.
        address: port, guest-physical address, or ``bdf << 32 | offset``; None likewise.
        size: bytes of one item; None likewise.
        since_ns: when it began.
        region: the region that answers, as soon as it is known.
        calling: the name of the handler or callback that was called last.
    """

    vcpu: int | None
    kind: str
    is_read: bool | None
    address: int | None
    size: int | None
    since_ns: int
    region: str | None
    calling: str | None


@dataclass(frozen=True, slots=True)
class ServerState:
    """An ioreq server.

    Attributes:
        name: of the server, and whether it is open.
        domid: the domain's number.
        requests: how many requests were answered or carried out.
        invalidations: how many INVALIDATEs were among them.
        failures: how many requests failed.
        lost_answers: how many answers no vCPU took.
        current: what it does now, innermost first: a handler may serve requests itself.
    """

    name: str
    domid: int
    requests: int
    invalidations: int
    failures: int
    lost_answers: int
    current: tuple[CurrentRequest, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A process.

    Attributes:
        pid: its number.
        argv: its command line.
        started_ns: when it was started.
        now_ns: when this was read.
        caches, servers: those that are watched.
        omitted: how many more caches and servers are watched.
    """

    pid: int
    argv: str
    started_ns: int
    now_ns: int
    caches: tuple[CacheState, ...]
    servers: tuple[ServerState, ...]
    omitted: int

    def to_json(self) -> str:
        """Return it as one line of ASCII, without a line end."""
        values = {"version": VERSION, **_values(self)}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Snapshot:
        """Return what a line says.

        Raises:
            SnapshotError: it is too long, not JSON, of another version, or a value is wrong or
                missing; or it is an error that the monitor reports.
        """
        if len(line) > MAX_BYTES:
            raise SnapshotError(f"the answer is longer than {MAX_BYTES:#x} bytes")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"the answer is not JSON: {error}") from None
        found = _Fields("answer", value)
        if "error" in found.values:
            raise SnapshotError(f"the monitor reports: {found.text('error')}")
        version = found.number("version")
        if version != VERSION:
            raise SnapshotError(
                f"the answer has version {version}, and this is a reader of version {VERSION}: "
                "use the xenmapcache that the process has"
            )
        return cls(
            found.number("pid"),
            found.text("argv"),
            found.number("started_ns"),
            found.number("now_ns"),
            tuple(map(_cache, found.objects("caches", MAX_WATCHED))),
            tuple(map(_server, found.objects("servers", MAX_WATCHED))),
            found.number("omitted"),
        )


def error_json(text: str) -> str:
    """Return the answer to what a monitor does not understand, or cannot do."""
    return json.dumps({"version": VERSION, "error": cut(text)}, separators=(",", ":"))


def cut(text: str) -> str:
    """Return a text, or its beginning if it is too long for an answer."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def _lease(found: _Fields) -> LeaseState:
    start = found.number("start")
    return LeaseState(
        found.number("id"),
        found.text("owner"),
        found.text("kind"),
        start,
        found.number("end", start),
        found.optional_text("direction"),
        found.number("taken_ns"),
        found.flag("stale"),
        found.text("thread"),
        found.texts("origin"),
    )


def _cache(found: _Fields) -> CacheState:
    stats = found.optional_object("stats")
    return CacheState(
        found.text("name"),
        found.optional_number("domid"),
        found.flag("closed"),
        None if stats is None else CacheStats(*map(stats.number, CacheStats._fields)),
        tuple(map(_lease, found.objects("leases", MAX_LEASES))),
        found.number("leases_omitted"),
        found.flag("incomplete"),
    )


def _job(found: _Fields) -> CurrentRequest:
    return CurrentRequest(
        found.optional_number("vcpu"),
        found.text("kind"),
        found.optional_flag("is_read"),
        found.optional_number("address"),
        found.optional_number("size"),
        found.number("since_ns"),
        found.optional_text("region"),
        found.optional_text("calling"),
    )


def _server(found: _Fields) -> ServerState:
    return ServerState(
        found.text("name"),
        found.number("domid"),
        found.number("requests"),
        found.number("invalidations"),
        found.number("failures"),
        found.number("lost_answers"),
        tuple(map(_job, found.objects("current", MAX_JOBS))),
    )


def _values(value: Any) -> Any:  # noqa: ANN401 - values of JSON
    """Return a value as json.dumps takes it."""
    if isinstance(value, CacheStats):
        return value._asdict()
    if isinstance(value, tuple):
        return [*map(_values, value)]
    names = getattr(value, "__dataclass_fields__", None)
    if names is None:
        return value
    return {name: _values(getattr(value, name)) for name in names}


class _Fields:
    """The values of one JSON object, each of which is checked when it is asked for.

    Args:
        place: of the object, for errors.
        value: what ``json.loads`` has returned.
    """

    def __init__(self, place: str, value: object) -> None:
        if not isinstance(value, dict):
            raise SnapshotError(f"{place}: {_show(value)} must be an object")
        self.place = place
        self.values = value

    def _get(self, key: str) -> Any:  # noqa: ANN401 - values of JSON
        if key not in self.values:
            raise SnapshotError(f"{self.place}: the key {key!r} is missing")
        return self.values[key]

    def _check(self, key: str, right: bool, rule: str) -> None:
        if not right:
            raise SnapshotError(f"{self.place}: {key} {_show(self.values[key])} must be {rule}")

    def number(self, key: str, low: int = 0) -> int:
        """Return a number from ``low`` to below 2**64."""
        value = self._get(key)
        right = type(value) is int and low <= value < _LIMIT
        self._check(key, right, f"a number from {low:#x} to below 2**64")
        return int(value)

    def text(self, key: str) -> str:
        """Return a text that is not too long."""
        value = self._get(key)
        right = isinstance(value, str) and len(value) <= MAX_TEXT
        self._check(key, right, f"a text of at most {MAX_TEXT} characters")
        return str(value)

    def flag(self, key: str) -> bool:
        """Return a truth value."""
        value = self._get(key)
        self._check(key, isinstance(value, bool), "true or false")
        return bool(value)

    def optional_number(self, key: str) -> int | None:
        """Return a number, or None for null."""
        return None if self._get(key) is None else self.number(key)

    def optional_text(self, key: str) -> str | None:
        """Return a text, or None for null."""
        return None if self._get(key) is None else self.text(key)

    def optional_flag(self, key: str) -> bool | None:
        """Return a truth value, or None for null."""
        return None if self._get(key) is None else self.flag(key)

    def optional_object(self, key: str) -> _Fields | None:
        """Return an object, or None for null."""
        value = self._get(key)
        return None if value is None else _Fields(f"{self.place}.{key}", value)

    def objects(self, key: str, most: int) -> Iterator[_Fields]:
        """Yield the objects of a list of up to ``most``."""
        for number, value in enumerate(self._list(key, most)):
            yield _Fields(f"{self.place}.{key}[{number}]", value)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Return a list of texts, or None for null."""
        if self._get(key) is None:
            return None
        found = self._list(key, MAX_FRAMES)
        right = all(isinstance(each, str) and len(each) <= MAX_TEXT for each in found)
        self._check(key, right, f"texts of at most {MAX_TEXT} characters")
        return tuple(found)

    def _list(self, key: str, most: int) -> list[Any]:
        value = self._get(key)
        right = isinstance(value, list) and len(value) <= most
        self._check(key, right, f"a list of at most {most}")
        return list(value)


def _show(value: object) -> str:
    """Return a wrong value as an error shows it."""
    text = hex(value) if type(value) is int else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
