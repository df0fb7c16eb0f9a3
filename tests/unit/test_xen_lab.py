"""The lab's own rules, without an emulator: what is a skip, and what a machine is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.xen.lab import boot
from tests.xen.lab import run as lab
from tests.xen.lab.hypervisor import SourceGoneError
from tests.xen.lab.image import Image
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


class Stopped:
    """Machines of which each runs two tests of those that it is given, and stands still then."""

    def __init__(self, given: list[list[str]], runs: int) -> None:
        self.given = given
        self._runs = runs

    def lines(self, *, deadline: float, idle: float) -> Iterator[str]:
        """Yield what the tests have reported."""
        assert 0 < deadline <= 60
        for nodeid in self.given[-1][: self._runs]:
            report = {"when": "call", "outcome": "passed", "duration": 0, "sections": []}
            yield json.dumps({"event": "report", "nodeid": nodeid, "properties": [], **report})
            yield json.dumps({"event": "finish", "nodeid": nodeid})
        raise boot.LabError(f"no sign of life for {idle:.0f} s; the console's last lines:\nhello")

    def close(self) -> None:
        """There is no process."""


@pytest.mark.parametrize(
    ("runs", "machines", "passed"), [(2, 3, [0, 1, 3, 4, 6, 7]), (0, 1, []), (9, 1, list(range(9)))]
)
def test_a_machine_that_stands_still(
    runs: int,
    machines: int,
    passed: list[int],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test that it was at has failed. Up to two others go on, if it had run any test at all."""
    given: list[list[str]] = []

    def order(_1: object, _2: object, _3: object, order: dict[str, list[str]], _4: object) -> None:
        given.append(order["nodeids"])

    for name in ("image", "wheel", "programs"):
        monkeypatch.setattr(lab, name, lambda *_: None)
    monkeypatch.setattr(lab, "optional_wheels", lambda *_: [])
    monkeypatch.setattr(lab, "payload", order)
    monkeypatch.setattr(lab, "Machine", lambda *_, **__: Stopped(given, runs))
    items = [
        pytest.Function.from_parent(request.node.parent, name=f"test_{i}", callobj=lambda: None)
        for i in range(9)
    ]
    run = lab.Run(replace(PLAN, deadline=60), items, lambda _: None)
    try:
        outcomes = [{report.outcome for report in run.reports(item)} for item in items]
    finally:
        run.close()
    assert [i for i, outcome in enumerate(outcomes) if outcome == {"passed"}] == passed
    assert ["failed" in outcome for outcome in outcomes] == [i not in passed for i in range(9)]
    assert len(given) == machines
    assert [len(nodeids) for nodeids in given] == [9, 6, 3][:machines]


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


# An emulator that tells what comes from its monitor and its console, and ends after the first key.
EMULATOR = f"""#!{sys.executable}
import re, socket, sys
(number,) = re.findall("socket,id=monitor,fd=([0-9]+)", " ".join(sys.argv))
with socket.socket(fileno=int(number)) as monitor, monitor.makefile("rw") as lines:
    print("QMP greets", file=lines, flush=True)
    for line in lines:
        print(line.strip(), flush=True)
        if "send-key" in line:
            break
print(sys.stdin.buffer.read(1).hex(), flush=True)
"""


def test_a_machine_is_kept_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator is given a character for the console, and a key, whose interrupt Xen takes."""
    emulator = tmp_path / "emulator"
    emulator.write_text(EMULATOR)
    emulator.chmod(0o755)
    monkeypatch.setattr(
        boot, "tool", lambda name: str(emulator) if name.startswith("qemu") else name
    )
    image = Image(PLATFORMS["4.20"], tmp_path, tmp_path / "xen")
    with boot.Machine(image) as machine:
        assert list(machine.lines(deadline=60, idle=60)) == []
        machine.close()
        capabilities, key, character = machine.tail().splitlines()
    assert json.loads(capabilities) == {"execute": "qmp_capabilities"}
    assert json.loads(key) == boot.KEY
    assert bytes.fromhex(character) == boot.KICK
