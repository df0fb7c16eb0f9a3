"""``xenmapcache translate``: where virtual addresses are in a guest's memory, and why not."""

from __future__ import annotations

import argparse

from ..cache import MapCache
from ..errors import TranslationError
from ..formats.pagetables import PAGE_TABLE_LEVELS, Rights
from ..guest.addressspace import AddressSpace, Step
from .arguments import CommandError, add_source, describe, number, size
from .output import place, print_json, print_line
from .output import size as size_text
from .sources import open_cache, opening, usage_errors

_DEFAULT_LEVELS = 4


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Translate virtual addresses. For each, the guest-physical address and the page's size\n"
        "and rights are printed, and then each level's entry: its name, its guest-physical\n"
        "address and its value. The page tables are those of the Linux kernel, unless --cpu or\n"
        "--root names others.",
        "  xenmapcache translate guest.core 0xffffffff81000000\n"
        "  xenmapcache translate guest.elf --cpu 0 0x7fffbfe51120\n"
        "  xenmapcache translate xen:web --root 0x1a2b000 --levels 5 0xffff888000000000\n"
        "exit status: 0, 1 if an address is not mapped, 2 for an error",
    )
    add_source(parser)
    parser.add_argument(
        "addresses", metavar="ADDRESS", type=size, nargs="+", help="virtual, such as 0x7f0000001000"
    )
    add_space(parser)


def add_space(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose page tables; without them, VMCOREINFO tells the kernel's."""
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument(
        "--cpu", type=number, metavar="N", help="page tables that CPU N was using (x86-64 dumps)"
    )
    tables.add_argument(
        "--root", type=size, metavar="ADDRESS", help="guest-physical address of the page tables"
    )
    parser.add_argument(
        "--levels",
        type=number,
        metavar="N",
        help=f"with --root: how many levels they have (default: {_DEFAULT_LEVELS})",
    )
    parser.add_argument(
        "--machine",
        choices=list(PAGE_TABLE_LEVELS),
        help="with --root: whose page tables they are (default: x86-64)",
    )
    parser.add_argument(
        "--half", choices=["upper", "lower"], help="with --machine arm64: TTBR1 (default) or TTBR0"
    )


def open_space(cache: MapCache, options: argparse.Namespace) -> AddressSpace:
    """Return the address space that the user's options choose."""
    if options.root is None:
        for name in ("levels", "machine", "half"):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name} needs --root, the address of the page tables")
    with usage_errors():
        if options.root is not None:
            return AddressSpace(
                cache,
                options.root,
                levels=_DEFAULT_LEVELS if options.levels is None else options.levels,
                machine=options.machine or "x86-64",
                half=options.half or "upper",
            )
        if options.cpu is not None:
            return AddressSpace.of_cpu(cache, options.cpu)
        return AddressSpace.of_kernel(cache)


def run(options: argparse.Namespace) -> int:
    """Print where addresses are. Returns 0, or 1 if one is not mapped."""
    with open_cache(options.source, **opening(options)) as cache:
        space = open_space(cache, options)
        found = [_walked(space, address) for address in options.addresses]
    if options.json:
        facts: dict[str, object] = {"machine": space.machine, "levels": space.levels}
        facts |= place(space.root, "root")
        facts["addresses"] = [
            _facts(address, steps, error)
            for address, (steps, error) in zip(options.addresses, found, strict=True)
        ]
        print_json(facts)
    else:
        for address, (steps, error) in zip(options.addresses, found, strict=True):
            _print_walk(address, steps, error)
    return 1 if any(error for _, error in found) else 0


def _walked(space: AddressSpace, address: int) -> tuple[list[Step], str]:
    """Return the steps of a walk, and what went wrong; empty if nothing did."""
    steps = []
    try:
        for step in space.walk(address):
            steps.append(step)  # noqa: PERF402 - those before an error are kept
    except TranslationError as error:
        return steps, str(error)
    return steps, ""


def _print_walk(address: int, steps: list[Step], error: str) -> None:
    page = steps[-1].page if steps else None
    if page is None:
        print_line(f"{address:#018x}  {error}")
    else:
        kind = f"{size_text(page.size)} page, {_rights(page.rights)}"
        print_line(f"{address:#018x}  {page.physical:#010x}  {kind}")
    for step in steps:
        print_line(f"  {step.level:4}  {step.entry_address:#010x}  {step.entry:#018x}")


def _rights(rights: Rights) -> str:
    letters = f"r{'w' if rights.writable else '-'}{'x' if rights.executable else '-'}"
    return f"{letters} {'user' if rights.user else 'kernel'}"


def _facts(address: int, steps: list[Step], error: str) -> dict[str, object]:
    facts = place(address)
    page = steps[-1].page if steps else None
    if page is None:
        facts["error"] = error
    else:
        facts |= place(page.physical, "physical")
        facts |= {"page_size": page.size} | page.rights._asdict()
    facts["steps"] = [
        {"level": step.level}
        | place(step.entry_address, "entry_address")
        | place(step.entry, "entry")
        for step in steps
    ]
    return facts
