"""``xenmapcache demo``: a guest balloons while DMA is under way, on the mock."""

from __future__ import annotations

import argparse
import contextlib

from .arguments import Commands, add_command
from .output import Output, print_json


def prepare_parser(commands: Commands) -> None:
    """Add the command."""
    add_command(
        commands,
        "demo",
        "show what ballooning does to DMA, without Xen",
        "Show on a mock guest what this package is about: a guest balloons while DMA is\n"
        "under way. Needs neither Xen nor root.",
        "  xenmapcache demo\n  xenmapcache demo --json | jq .outcomes.warn\nexit status: 0",
        tables=True,
    )


def run(options: argparse.Namespace) -> int:
    """Play the story; as one JSON object with ``--json``. Returns the exit status."""
    from .story import recorded, story  # the mock is not for other commands

    with recorded() as log, contextlib.closing(story(log)) as steps:
        if options.json:
            print_json({step.key: step.facts for step in steps})
            return 0
        output = Output()
        for step in steps:
            output.section(step.title)
            output.text(step.text)
            output.table(step.header, step.rows)
            if step.verdict:
                output.text(f"\n{step.verdict}", "bold")
    return 0
