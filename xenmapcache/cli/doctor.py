"""``xenmapcache doctor``: print what mapping a live guest needs, and what of it is missing."""

from __future__ import annotations

import argparse

from .arguments import describe, domid
from .output import Output, print_json


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Check what mapping a live guest needs, and map one page of one.",
        "  xenmapcache doctor\n"
        "  xenmapcache doctor --domid $(xl domid NAME)\n"
        "  xenmapcache doctor --json | jq '.findings[] | select(.state == \"problem\")'\n"
        "exit status: 0 if a live guest was mapped, else 1",
        tables=True,
    )
    parser.add_argument(
        "--domid", type=domid, metavar="N", help="map this guest (default: the first in xl list)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 0 if a page of a live guest was mapped, else 1."""
    from ..doctor import examine

    output = None if options.json else Output()
    findings = list(examine(options.domid))
    ready = any(finding.details.get("mapped") for finding in findings)
    if output is None:
        print_json({"ready": ready, "findings": [finding._asdict() for finding in findings]})
        return 0 if ready else 1
    for section in dict.fromkeys(finding.section for finding in findings):
        output.section(section)
        output.table(
            ("", "", ""),
            [
                (each.state, each.subject, "\n-> ".join(filter(None, (each.text, each.remedy))))
                for each in findings
                if each.section == section
            ],
        )
    problems = sum(finding.state == "problem" for finding in findings)
    if ready:
        output.section("A live guest was mapped.")
    else:
        plural = "" if problems == 1 else "s"
        output.section(f"No live guest was mapped: {problems} problem{plural}.")
        output.text("Without Xen: xenmapcache demo, or open_backend('mock', memory='256M').")
    return 0 if ready else 1
