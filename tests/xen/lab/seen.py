"""The table of what was seen where, from JUnit files of test runs in the lab.

``python -m tests.xen.lab.seen build/xen/*.xml`` prints it; ``--write docs/testing.md`` puts it into
that page, between its two marks.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from .platform import PLATFORMS, Platform
from .report import NOT_RUN

FEATURES: Final = {
    "tests.xen.test_lab_smoke": "the machine boots, with a guest",
    "tests.xen.test_live_guest": "map, read, write, fork, the end of a domain",
    "tests.xen.test_survey": "`info` finds each page, and maps no holes",
    "tests.xen.test_forks": "forked children",
    "tests.xen.test_failed_pages": "no path touches a page that could not be mapped",
    "tests.conformance.test_backend": "the contract of a backend",
    "tests.conformance.test_cache": "the contract of a cache",
    "tests.conformance.test_window": "flat views",
    "tests.qemu": "no defect of QEMU's map cache",
    "tests.xen.test_invalidate": "INVALIDATE and ballooning",
    "tests.xen.test_devicemodel": "device models: requests, vCPUs, interrupts",
    "tests.xen.test_block_device": "a device with DMA",
    "tests.xen.test_virtio_disk": "virtio disks with the guest's own driver",
    "tests.xen.test_virtio_hostile": "virtio drivers that break the rules",
    "tests.xen.test_arm_devices": "devices for guests on Arm",
    "tests.xen.test_hvm": "HVM guests, next to QEMU",
    "tests.xen.test_grants": "granted pages",
    "tests.xen.test_saved_guest": "`xl save`, `xl restore`",
    "tests.xen.test_dump": "dumps of a paused guest",
    "tests.xen.test_xl_dump": "the same dump as `xl dump-core`",
    "tests.xen.test_drgn": "drgn",
    "tests.xen.test_mount": "`xenmapcache mount`",
    "tests.xen.test_holders": "`xenmapcache holders`",
    "tests.xen.test_observing": "monitor and recording of a device model",
    "tests.xen.test_firmware_disk": "firmware boots from a disk of ours",
    "tests.xen.test_guest_end": "the end of a guest ends its server",
    "tests.xen.test_address_space": "page tables of a live guest",
    "tests.xen.test_devicemodel_speed": "how long requests and INVALIDATEs take",
    "tests.xen.test_disk_speed": "a virtio disk next to QEMU's",
}
"""What the tests of a module, or of a folder, show."""
BEGIN: Final = "<!-- seen: begin -->"
END: Final = "<!-- seen: end -->"
OUTCOMES: Final = ("passed", "failed", "skipped")

Seen = Mapping[str, Mapping[str, Counter[str]]]
"""Of each feature and machine, how many tests had which outcome."""


def read(paths: Iterable[Path]) -> Seen:
    """Count the outcomes in JUnit files. Tests that did not run in the lab are left out.

    A machine may have run its tests in parts, and some of them again. Then a test counts once: with
    its last outcome, but a test that was skipped in one run only counts with that of the other.
    """
    latest: dict[tuple[str, str, str], tuple[bool, str, str]] = {}
    for path in paths:
        for suite in ElementTree.parse(path).iter("testsuite"):
            for case in suite.iter("testcase"):
                outcome = _outcome(case)
                if (machine := _machine(case)) is None or outcome is None:
                    continue
                test = machine, case.get("classname", ""), case.get("name", "")
                result = outcome != "skipped", suite.get("timestamp", ""), outcome
                latest[test] = max(result, latest.get(test, result))
    seen: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for (machine, module, _), (*_, outcome) in latest.items():
        seen[_feature(module)][machine][outcome] += 1
    return seen


def table(seen: Seen, platforms: Mapping[str, Platform] = PLATFORMS) -> str:
    """Return Markdown: a column for each machine that was used, a row for each feature."""
    used = {name for machines in seen.values() for name in machines}
    columns = [name for name in platforms if name in used]
    heads = {
        "": columns,
        "Xen": [platforms[name].release.xen for name in columns],
        "architecture": [platforms[name].architecture.name for name in columns],
        "Dom0": [platforms[name].dom0.upper() for name in columns],
        "guest": [platforms[name].guest.upper() for name in columns],
    }
    known = list(dict.fromkeys([*FEATURES.values(), *sorted(seen)]))
    rows = [[title, *cells] for title, cells in heads.items()]
    rows += [
        [feature, *(_cell(seen[feature].get(name)) for name in columns)]
        for feature in known
        if feature in seen
    ]
    rows.insert(1, ["---"] * (len(columns) + 1))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(page: str, text: str) -> str:
    """Return a page with another table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{begin}\n{text}{end}{after}"


def _feature(module: str) -> str:
    """Return what the tests of a module show; its name if that is not known."""
    found = [name for name in FEATURES if f"{module}.".startswith(f"{name}.")]
    return FEATURES[found[0]] if found else ".".join(module.split(".")[:3])


def _machine(case: ElementTree.Element) -> str | None:
    """Return the machine of the lab that a test ran on."""
    return next(
        (each.get("value") for each in case.iter("property") if each.get("name") == "machine"), None
    )


def _outcome(case: ElementTree.Element) -> str | None:
    """Return a test's outcome; None if the machine was gone before its turn."""
    for failure in (case.find("failure"), case.find("error")):
        if failure is not None:
            return None if NOT_RUN in (failure.text or "") else "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def _cell(counts: Counter[str] | None) -> str:
    if counts is None:
        return "not run"
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]]
    return ", ".join(parts)


def main() -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.lab.seen", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JUnit XML")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table in PAGE")
    arguments = parser.parse_args()
    text = table(read(arguments.files))
    if arguments.write is None:
        sys.stdout.write(text)
    else:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(written(page, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
