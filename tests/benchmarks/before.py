"""How much faster than an earlier version: ``python -m tests.benchmarks.before TREE``.

TREE is a checkout of that version (``git worktree add TREE COMMIT``). The same work runs in new
processes over the one and the other in turn; shown are ratios of the best processor times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import steps
from tests.benchmarks.footprint import ROOT
from tests.benchmarks.images import make_images
from tests.benchmarks.report import PAGE, Table, markdown, rewrite, show
from tests.benchmarks.timing import machine, pin
from xenmapcache.address import MiB

COMMAND = "python -m tests.benchmarks.before"
ROUNDS = 7
SIZE = 64 * MiB
TIMES = steps.TIMES

Times = dict[str, float]


def measure(tree: Path, image: Path) -> Times:
    """Time the work with the package of a tree.

    Raises:
        RuntimeError: it does not run there; with what was said.
    """
    command = [sys.executable, steps.__file__, str(image), str(TIMES)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr}")
    times: Times = json.loads(done.stdout)
    return times


def best(trees: list[Path], image: Path, rounds: int) -> list[Times]:
    """Return the best times of each tree, measured in turn."""
    runs = [[measure(tree, image) for tree in trees] for _ in range(rounds)]
    return [
        {name: min(each[name] for each in of_tree) for name in of_tree[0]}
        for of_tree in zip(*runs, strict=True)
    ]


def table(before: Times, after: Times) -> Table:
    headings = ("work", "", "before, ms", "after, ms", "after / before")
    return headings, [
        (
            name,
            "",
            f"{1e3 * before[name]:,.2f}",
            f"{1e3 * taken:,.2f}",
            f"{taken / before[name]:.2f}",
        )
        for name, taken in after.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("tree", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--write", action="store_true", help=f"rewrite its table in {PAGE.name}")
    options = parser.parse_args()
    pin()
    with tempfile.TemporaryDirectory() as folder:
        image = make_images(Path(folder), SIZE)["save"]
        before, after = best([options.tree.resolve(), ROOT], image, ROUNDS)
    print(machine())
    shown = table(before, after)
    show({"before": shown}, 120)
    if options.write:
        rewrite(PAGE, "machine", f"{machine()}\n", COMMAND)
        rewrite(PAGE, "before", markdown(*shown), COMMAND)


if __name__ == "__main__":
    main()
