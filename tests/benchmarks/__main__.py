"""Measure what the project promises, and compare it with other packages.

The same memory is written in each format into a temporary folder. First every candidate must
give the right bytes; if one does not, nothing is timed and the exit status is 1. It is 1, too, if
a limit of what is promised of the cache is exceeded; one that is promised of files is only marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import files, xen_stub
from tests.benchmarks.candidates import BARE, OURS
from tests.benchmarks.comparison import WrongBytesError, measure
from tests.benchmarks.footprint import footprint, import_figures
from tests.benchmarks.images import FORMATS, make_images
from tests.benchmarks.peers import PEERS
from tests.benchmarks.promises import promises
from tests.benchmarks.report import PAGE, Report
from tests.benchmarks.timing import pin
from xenmapcache.address import MiB, parse_size


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=parse_size, default=256 * MiB, help="of memory (256M)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (7)")
    parser.add_argument("--without-peers", action="store_true", help="ours and the bare things")
    parser.add_argument("--without-promises", action="store_true", help="leave out what has limits")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    text = f"rewrite the tables in {PAGE.name}, and draw the chart"
    parser.add_argument("--write", action="store_true", help=text)
    options = parser.parse_args(arguments)
    if options.size % MiB or options.size < 4 * MiB or options.rounds < 2:
        parser.error("at least 4 MiB, in whole MiB, and 2 rounds")
    return options


def with_stub(arguments: list[str]) -> int:
    """Run this again, with the stand-in for Xen's libraries loaded."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks", *arguments]
        environment = os.environ | xen_stub.build(Path(folder))
        return subprocess.run(command, env=environment, check=False).returncode


def run(options: argparse.Namespace) -> Report:
    """Measure everything.

    Raises:
        WrongBytesError: a candidate does not give what is in the image.
    """
    pin()
    candidates = [*BARE, *OURS, *([] if options.without_peers else PEERS)]
    candidates.sort(key=lambda each: FORMATS.index(each.format))  # what reads the same, together
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder), options.size)
        rows = measure(candidates, paths, options.rounds)
        measured = [row.candidate for row in rows if row.figures]
        return Report(
            options.size,
            options.rounds,
            rows,
            [footprint(each, paths[each.format], options.size) for each in measured],
            import_figures({each.modules for each in measured}, options.rounds),
            [] if options.without_promises else list(files.promises(paths, options.rounds)),
            [] if options.without_promises else promises(),
        )


def main() -> int:
    options = parse(sys.argv[1:])
    if xen_stub.FOLDER not in os.environ:
        return with_stub(sys.argv[1:])
    try:
        report = run(options)
    except WrongBytesError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.print()
    if options.write:
        from tests.benchmarks import bars  # its matplotlib is not everywhere

        report.write()
        bars.draw(report.rows)
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
