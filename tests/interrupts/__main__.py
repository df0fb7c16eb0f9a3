"""``python -m tests.interrupts [OPERATION [HANDLER [POINT]]]``: runs points, prints what is wrong.

OPERATION and HANDLER may be patterns, as ``cache.*``. All points are run, or with ``--samples N``
about N of each combination.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .injector import Injector, MissingError, build
from .points import Report, Runner
from .table import OPERATIONS
from .world import Operation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interrupts", description=__doc__)
    parser.add_argument("operation", nargs="?", default="*")
    parser.add_argument("handler", nargs="?", default="*")
    parser.add_argument("point", nargs="?", type=int)
    parser.add_argument("--samples", type=int, help="about N points of each combination")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alternate", action="store_true", help="only every second combination")
    parser.add_argument("--until", metavar="REGEX", help="stop at the first finding that has it")
    parser.add_argument("--list", action="store_true", help="print the table")
    parser.add_argument("--json", action="store_true", help="print each report as a line of JSON")
    parser.add_argument("--folder", type=Path, help="where the injector is, or will be, built")
    parser.add_argument("--brief", action="store_true", help="one line for each kind of problem")
    options = parser.parse_args()
    rows = [OPERATIONS[name] for name in OPERATIONS if fnmatch.fnmatch(name, options.operation)]
    if options.list:
        for row in rows:
            print(f"{row.name:28} {' '.join(row.handlers)}")
        return 0
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="xenmapcache-interrupts-"))
        try:
            injector = Injector(build(options.folder or Path(name)))
        except MissingError as error:
            print(error, file=sys.stderr)
            return 77
        runner = Runner(injector, Path(name), options.samples, options.seed, options.until)
        return run_all(runner, rows, options)


def run_all(runner: Runner, rows: list[Operation], options: argparse.Namespace) -> int:
    """Run what was chosen, print the reports, and return 1 if something is wrong."""
    failed = 0
    for number, row in enumerate(rows):
        handlers = [each for each in row.handlers if fnmatch.fnmatch(each, options.handler)]
        if options.alternate:
            handlers = handlers[number % 2 :: 2]
        for report in runner.run(row, handlers, options.point):
            if options.json:
                print(json.dumps(vars(report) | {"findings": [*map(str, report.findings)]}))
            else:
                show(report, brief=options.brief)
            failed += bool(report.findings) or not report.tried
    return int(failed > 0)


def show(report: Report, *, brief: bool) -> None:
    """Print a report."""
    findings = report.findings
    verdict = f"{len(findings)} problems" if findings else "ok" if report.tried else "NO POINT"
    name = f"{report.operation} {report.handler}"
    print(f"{name:42} {report.tried:5} points  {verdict}", flush=True)
    if not brief:
        for finding in findings:
            print(f"  {finding}")
        return
    kinds = Counter(finding.problem.splitlines()[0][:150] for finding in findings)
    for kind, count in kinds.items():
        places = dict.fromkeys(
            f"{f.where.rpartition('xenmapcache/')[2]} #{f.point}"
            for f in findings
            if f.problem.startswith(kind)
        )
        print(f"    {count:4} {kind} | {'; '.join(list(places)[:8])}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
