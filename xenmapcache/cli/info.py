"""``xenmapcache info``: what a source is, and which memory it has."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

from ..address import PAGE_SHIFT
from ..backend import Backend
from ..cache import MapCache
from ..formats import cpu_notes
from .arguments import add_range, add_source, describe
from .output import Output, place, print_json, size
from .sources import address_range, merge_adjacent, open_cache, opening, present

_SHOWN_RANGES = 40
_SHOWN_CPUS = 8
_SHOWN_NOTES = 8
_SHOWN_PARTIAL_PAGES = 8
_SHOWN_REGISTERS = ("rip", "rsp", "cr3")
_SHOWN_VMCOREINFO = (
    "OSRELEASE",
    "BUILD-ID",
    "PAGESIZE",
    "KERNELOFFSET",
    "NUMBER(phys_base)",
    "SYMBOL(swapper_pg_dir)",
    "CRASHTIME",
)
"""What people need for page tables, and to tell which kernel it was."""
_BUCKET_SHIFT = 22
"""Nothing is read, so few map calls show which pages are present, with little of a hole."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show what a source is, which ranges of memory it has, and what its headers say.",
        "  xenmapcache info guest.core\n"
        "  xenmapcache info --json xen:web | jq .ranges\n"
        "exit status: 0, 2 for an error",
        tables=True,
    )
    add_source(parser)
    add_range(parser)
    parser.add_argument("--all", action="store_true", help="print all ranges, however many")


def run(options: argparse.Namespace) -> int:
    """Print what is known about a source. Returns the exit status."""
    output = None if options.json else Output()
    with open_cache(options.source, _BUCKET_SHIFT, **opening(options)) as cache:
        start, end = address_range(options.start, options.length, cache)
        ranges = list(merge_adjacent(present(cache, start, end)))
        total = sum(last - first for first, last in ranges)
        holes = list(_holes(ranges, start, end))
        notes = _notes(cache, total)
        if output is None:
            print_json(_facts(options.source, cache, total, ranges, holes, notes))
            return 0
    output.table(
        ("", ""),
        [
            ("source", options.source),
            ("backend", cache.backend.name),
            ("looked at", f"{start:#x} to {end:#x}"),
            ("memory", f"{total >> PAGE_SHIFT} pages, {size(total)}"),
            ("ranges", str(len(ranges))),
            ("holes", f"{len(holes)}, {size(sum(last - first for first, last in holes))}"),
        ],
    )
    shown = ranges if options.all else ranges[:_SHOWN_RANGES]
    if shown:
        output.table(
            ("from", "to", "size"),
            [(f"{first:#010x}", f"{last:#010x}", size(last - first)) for first, last in shown],
        )
    if len(shown) < len(ranges):
        output.text(f"\nand {len(ranges) - len(shown)} more: see --all or --json")
    if notes:
        output.section("What the source says")
        output.table(("", ""), [row for name, value in notes.items() for row in _rows(name, value)])
    return 0


def _notes(cache: MapCache, total: int) -> dict[str, object]:
    """Return what the source says of itself, with VMCOREINFO and processors taken apart."""
    notes = cache.backend.describe() | _why_empty(cache, total)
    text = notes.get("vmcoreinfo")
    if isinstance(text, str):
        pairs = [line.partition("=") for line in text.splitlines()]
        notes["vmcoreinfo"] = {name: value for name, equals, value in pairs if equals}
    cpus = _processors(cache.backend)
    return notes | {"cpus": cpus} if cpus else notes


def _processors(backend: Backend) -> list[dict[str, object]]:
    """Return the registers of each processor, as JSON has them."""
    if getattr(backend, "machine", None) != "x86-64":
        return []
    contexts = getattr(backend, "contexts", None)
    if contexts is None:
        cpus = cpu_notes.registers(getattr(backend, "notes", ()))
    else:
        cpus = cpu_notes.of_xen(contexts())
    found = []
    for known in cpus:
        shown: dict[str, object] = {"cpu": known.pop("cpu")}
        for name, value in known.items():
            shown |= place(value, name)
        found.append(shown)
    return found


def _rows(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield the lines of a note for people."""
    title = name.replace("_", " ")
    if name == "cpus" and isinstance(value, list):
        for each in value[:_SHOWN_CPUS]:
            shown = " ".join(
                f"{register} {each[f'{register}_hex']}"
                for register in _SHOWN_REGISTERS
                if register in each
            )
            yield f"cpu {each['cpu']}", shown
        if len(value) > _SHOWN_CPUS:
            yield "", f"and {len(value) - _SHOWN_CPUS} more: see --json"
    elif name == "notes" and isinstance(value, list):
        kinds = Counter(f"{each['name']} {each['type']}" for each in value)
        most = [
            f"{kind} ({count} times)" if count > 1 else kind
            for kind, count in kinds.most_common(_SHOWN_NOTES)
        ]
        more = len(kinds) - len(most)
        yield title, ", ".join([*most, f"and {more} more: see --json"] if more > 0 else most)
    elif name == "vmcoreinfo" and isinstance(value, dict):
        for key in _SHOWN_VMCOREINFO:
            if key in value:
                yield title, f"{key}={value[key]}"
                title = ""
        yield title, f"{len(value)} lines in all: see --json"
    elif name == "partial_pages" and isinstance(value, list):
        for each in value[:_SHOWN_PARTIAL_PAGES]:
            yield title, f"{each['page']}, missing bytes: {each['missing_bytes']}"
            title = ""
        if len(value) > _SHOWN_PARTIAL_PAGES:
            yield title, f"and {len(value) - _SHOWN_PARTIAL_PAGES} more: see --json"
    else:
        yield title, _text(value)


def _why_empty(cache: MapCache, total: int) -> dict[str, object]:
    """Return why a live guest has no memory, if it has none."""
    domid = getattr(cache.backend, "domid", None)
    if total or domid is None or cache.backend.name == "mock":
        return {}
    from ..doctor.guest import explain_no_pages

    return {"no_memory": "; ".join(explain_no_pages(domid))}


def _holes(ranges: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    for first, last in ranges:
        if start < first:
            yield start, first
        start = last
    if start < end:
        yield start, end


def _facts(
    source: str,
    cache: MapCache,
    total: int,
    ranges: list[tuple[int, int]],
    holes: list[tuple[int, int]],
    notes: dict[str, object],
) -> dict[str, object]:
    return {
        "source": source,
        "backend": cache.backend.name,
        **_end(cache.memory_end),
        "pages": total >> PAGE_SHIFT,
        "ranges": [_range(*each) for each in ranges],
        "holes": [_range(*each) for each in holes],
        "notes": notes,
    }


def _end(memory_end: int | None) -> dict[str, object]:
    if memory_end is None:
        return {"memory_end": None, "memory_end_hex": None}
    return place(memory_end, "memory_end")


def _range(first: int, last: int) -> dict[str, object]:
    return place(first) | {"length": last - first}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
