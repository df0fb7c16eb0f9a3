"""What is documented for each cell of the matrix: the bytes, other safe bytes, or an exception."""

from __future__ import annotations

from collections.abc import Iterator

SOURCES = ("mock", "cffi", "ctypes")
"""The mock, and the code for live domains over the stand-in for Xen's library, bound both ways."""

VIEWS = ("view", "slice", "ctypes structure", "cast array")
LEASES = ("DMA lease", "device lease")
ITERATORS = ("views() half-way", "find() half-way")
CALLS = ("read under way", "write under way", "map_dma under way")
KERNEL = ("readinto(view) under way", "sendmsg([view]) under way", "writev([view]) under way")
ROWS = (*VIEWS, *LEASES, *ITERATORS, *CALLS, *KERNEL)

EVENTS = (
    "eviction",
    "invalidate()",
    "close()",
    "close(force=True)",
    "backend close",
    "domain end",
    "replace()",
    "replace() that loses",
    "fork",
    "Ctrl-C in a map",
    "Ctrl-C in a release",
    "RLIMIT_AS",
    "RLIMIT_NOFILE",
    "close to the recursion limit",
    "the n-th allocation fails",
    "collected: __del__ uses it",
    "collected: a generator's finally uses it",
    "collected: a coroutine uses it",
    "collected: an exception in its own frame",
)
EXITS = (
    "end of program",
    "sys.exit()",
    "sys.exit() in a thread",
    "os._exit()",
    "at exit: used by atexit",
    "at exit: used by a daemon thread",
    "at exit: in a cycle, in __del__",
)
COLUMNS = (*EVENTS, *EXITS)
ALONE = (*EXITS, "RLIMIT_AS")
"""What has a process of its own: it ends Python, or needs to know what memory Python still has."""

BYTES = "bytes"
ENDED = "status 0"

_OTHERS = {
    "close()": dict.fromkeys(LEASES, "LeaseError, bytes")
    | dict.fromkeys((*ITERATORS, *CALLS), "ClosedError"),
    "close(force=True)": dict.fromkeys(LEASES, "LeaseError")
    | dict.fromkeys((*ITERATORS, *CALLS), "ClosedError"),
    "backend close": dict.fromkeys((*ITERATORS, *CALLS[1:]), "ClosedError"),
    "domain end": dict.fromkeys(("views() half-way", *CALLS), "FaultError")
    | {"find() half-way": "no match"},
    "replace()": dict.fromkeys((*VIEWS, "device lease"), "new bytes"),
    "replace() that loses": dict.fromkeys((*VIEWS, "device lease"), "MappingLostError, zeros"),
    "fork": dict.fromkeys((*VIEWS, *KERNEL), "zeros")
    | dict.fromkeys((*LEASES, *ITERATORS, *CALLS), "ClosedError"),
}


def expected(row: str, column: str) -> str:
    """Return what is documented to become of it."""
    if column in EXITS:
        return ENDED
    return _OTHERS.get(column, {}).get(row, BYTES)


BEHAVIOURS = {
    "NULL, an errno": "XenCallError",
    "NULL, errno 0": "XenCallError",
    "err[] of the other sign": "FaultError",
    "a pointer, all pages failed": "FaultError",
    "a pointer, all pages refused": "XenCallError",
    "a pointer, all pages ESRCH": "XenCallError",
    "err[] half written": "FaultError",
    "a pointer to no page's begin": "XenCallError",
    "blocks": BYTES,
    "blocks, Ctrl-C": "KeyboardInterrupt",
}
"""How the library misbehaves, and what comes of every operation that has to map then."""

OPERATIONS = ("read", "read_into", "write", "views", "map_dma", "map_device", "release with copy")


def markdown() -> Iterator[str]:
    """Yield the lines of the tables, as the documentation has them; equal columns as one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in ROWS:
        alike.setdefault(tuple(expected(row, column) for column in EVENTS), []).append(row)
    yield from _table(
        ["", *map(", ".join, alike.values())],
        [[event, *outcomes] for event, *outcomes in zip(EVENTS, *alike, strict=True)]
        + [[column, *[ENDED] * len(alike)] for column in EXITS],
    )
    yield from _table(["the library", "each operation"], list(map(list, BEHAVIOURS.items())))


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
