"""The lab's own rules, without an emulator: what is a skip, and what a machine is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.xen.lab import run as lab
from tests.xen.lab.hypervisor import SourceGoneError
from tests.xen.lab.platform import PLATFORMS
from tests.xen.lab.prerequisites import LabUnavailableError

PLAN = lab.Plan(
    project=Path(),
    platform=PLATFORMS["4.17-arm64-ioreq"],
    options=(),
    built=None,
    timeout=1,
    deadline=1,
    required=True,
    console=None,
)


@pytest.mark.parametrize(
    ("error", "required", "outcome"),
    [
        (LabUnavailableError, True, "failed"),
        (LabUnavailableError, False, "skipped"),
        (SourceGoneError, True, "skipped"),
        (SourceGoneError, False, "skipped"),
    ],
)
def test_a_lab_that_cannot_run(
    error: type[LabUnavailableError],
    required: bool,
    outcome: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a failure where it is required, unless a mirror has dropped the source it needs."""

    def refuse(_: object) -> None:
        raise error("no source")

    monkeypatch.setattr(lab, "image", refuse)
    run = lab.Run(replace(PLAN, required=required), [request.node], lambda _: None)
    try:
        outcomes = [report.outcome for report in run.reports(request.node)]
    finally:
        run.close()
    assert outcome in outcomes
    assert ({"failed", "skipped"} - {outcome}).isdisjoint(outcomes)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("4.17", ["xl", "mem-set", "web", "100"]),
        (
            "4.20-arm64",
            ["sh", "-c", "xenstore-write /local/domain/$(xl domid web)/memory/target 102400"],
        ),
    ],
)
def test_a_guest_is_told_its_memory(name: str, command: list[str]) -> None:
    """On Arm through xenstore, because xl fails there."""
    assert PLATFORMS[name].set_memory("web", 100) == command
