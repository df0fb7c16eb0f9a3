"""``xenmapcache drgn``: a drgn script, or drgn's prompt, on a guest's memory."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from ..cache import MapCache
from ..extras import require
from .arguments import FILES, CommandError, add_source, describe, size
from .sources import open_cache, opening, usage_errors

logger = logging.getLogger("xenmapcache")

_MAX_RESIDENT = "32GiB"
"""drgn reads here and there for a long time, as a program does."""
_FAILED = 1


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Run drgn on a guest, live or saved. A script gets the program as `prog`, as from\n"
        "drgn's own command. Without a script, drgn's prompt appears, or a script is read from\n"
        "stdin. Options come before the source; what follows the script is the script's.",
        "  xenmapcache drgn xen:web\n"
        "  xenmapcache drgn xen:web tasks.py --all\n"
        "  xenmapcache drgn --symbols vmlinux guest.core tasks.py\n"
        "  echo 'print(prog[\"UTS_RELEASE\"])' | xenmapcache drgn guest.core\n"
        "exit status: the script's; 1 if it raised an exception, 2 for an error",
        json=None,
    )
    add_source(parser)
    parser.add_argument(
        "-s",
        "--symbols",
        metavar="FILE",
        action="append",
        default=[],
        help="load symbols from this file, too; may be given more than once",
    ).complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--physical",
        action="store_true",
        help="look for no Linux kernel; only physical addresses can be read",
    )
    parser.add_argument(
        "--length",
        type=size,
        metavar="SIZE",
        help="how far to look for the kernel's VMCOREINFO (default: to the end of memory)",
    )
    parser.add_argument(
        "script",
        metavar="SCRIPT",
        nargs=argparse.REMAINDER,
        help="a Python file, and its arguments",
    ).complete = FILES  # type: ignore[attr-defined] # shtab's way


def run(options: argparse.Namespace) -> int:
    """Run the script or the prompt. Returns the exit status."""
    drgn: Any = require("drgn", "drgn", "drgn")
    script: list[str] = options.script
    if script and not Path(script[0]).is_file():
        raise CommandError(f"{script[0]} is not a file; give a Python script for drgn")
    with open_cache(options.source, max_resident=_MAX_RESIDENT, **opening(options)) as cache:
        program = _program(drgn, cache, options)
        if not script and sys.stdin.isatty():
            require("drgn.cli", "drgn", "drgn").run_interactive(program)
            return 0
        return _run_code(drgn, program, script)


def _program(drgn: Any, cache: MapCache, options: argparse.Namespace) -> Any:  # noqa: ANN401 - drgn is optional
    """Return the program, with the symbols that are found."""
    from ..adapters.drgn import program

    text = "" if options.physical else None
    with usage_errors():
        made = program(cache, vmcoreinfo=text, length=options.length)
    is_kernel = bool(made.flags & drgn.ProgramFlags.IS_LINUX_KERNEL)
    if is_kernel or options.symbols:
        try:
            made.load_debug_info(options.symbols, default=is_kernel, main=is_kernel)
        except drgn.MissingDebugInfoError as error:
            logger.warning("%s", " ".join(str(error).split()))
    return made


def _run_code(drgn: Any, program: Any, script: list[str]) -> int:  # noqa: ANN401 - drgn is optional
    """Run a script, or what stdin has, as drgn's own command does."""
    drgn.set_default_prog(program)
    try:
        if script:
            sys.argv[:] = script
            sys.path.insert(0, str(Path(script[0]).resolve().parent))
            runpy.run_path(script[0], {"prog": program}, "__main__")
        else:
            sys.argv[:] = [""]
            names = require("drgn.cli", "drgn", "drgn").default_globals(program)
            code = compile(sys.stdin.read(), "<stdin>", "exec")
            exec(code, names | {"__file__": "<stdin>"})  # noqa: S102 - the user's own code
    except (BrokenPipeError, MemoryError):
        raise
    except Exception:
        traceback.print_exc()  # the script's own, which its author has to see
        return _FAILED
    finally:
        drgn.set_default_prog(None)
    return 0
