"""What is seen of a device model that holds DMA while its guest balloons: commands in Dom0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.xen.agent import MEMORY
from tests.xen.conftest import Served, balloon
from xenmapcache import record
from xenmapcache.address import MiB
from xenmapcache.cli import main
from xenmapcache.observe.monitor import serve
from xenmapcache.observe.recording import read
from xenmapcache.observe.sockets import VARIABLE
from xenmapcache.observe.timeline.making import picture_of

pytestmark = pytest.mark.xen

OWNER = "ide0"


@pytest.fixture
def monitored(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Served, Path]]:
    """A device model that has a monitor, is recorded, and holds DMA while the guest balloons."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "sockets"))
    path = tmp_path / "run.jsonl"
    cache, server = served.cache, served.server
    with serve(cache, server), record(cache, path) as recorder:
        recorder.add(server.observe)
        with cache.map_dma(served.agent.address(5 * MiB), 0x800, owner=OWNER):
            balloon(served, MEMORY - 4)
            yield served, path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:  # noqa: ANN401 - as json.loads
    """Run a command, and return what it prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_show_stale_dma(
    monitored: tuple[Served, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """``ps``, ``leases`` and ``top`` see it while it is held, of the right domain."""
    served, _ = monitored
    (process,) = output(capsys, "ps")["processes"]
    assert process["pid"] == os.getpid()
    assert process["stale_dma"] == 1
    assert served.domid in process["domids"]
    (process,) = output(capsys, "leases", str(os.getpid()))["processes"]
    (lease,) = [lease for cache in process["caches"] for lease in cache["leases"]]
    assert (lease["owner"], lease["stale"], lease["length"]) == (OWNER, True, 0x800)
    first = output(capsys, "top", str(os.getpid()), "--count", "1", "--interval", "0.1")
    assert OWNER in json.dumps(first)
    capsys.readouterr()
    assert main(["top", str(os.getpid()), "--count", "1", "--interval", "0.1"]) == 0
    assert OWNER in capsys.readouterr().out


def test_a_recording_shows_stale_dma(
    monitored: tuple[Served, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its picture has the lane of the owner, the INVALIDATEs and the stale lease."""
    _, path = monitored
    assert main(["events", str(path)]) == 0
    assert OWNER in capsys.readouterr().out
    picture = picture_of(read(path))
    assert picture is not None
    assert OWNER in [lane.name for lane in picture.lanes]
    assert picture.stale == 1
    assert picture.invalidations > 0
