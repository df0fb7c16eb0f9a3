"""``xenmapcache demo`` shows what it says it shows."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from xenmapcache.cli import main
from xenmapcache.cli.story import recorded
from xenmapcache.cli.story import story as tell
from xenmapcache.mapping import live_mappings

AGE = re.compile(r"\d+\.\d{3} s")


def play(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run the demo; return its output after seeing that there is nothing on stderr."""
    assert main(["demo", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def story(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the demo with --json."""
    facts: dict[str, Any] = json.loads(play(capsys, "--json"))
    return facts


def test_dma_is_warned_of_once_and_devices_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    """A burst of INVALIDATEs logs one warning per DMA lease, and none for the device lease."""
    facts = story(capsys)
    balloon = facts["balloon"]
    assert balloon["invalidate_requests"] == 13
    assert balloon["warnings_logged"] == len(balloon["log"]) == 3
    assert [lease["owner"] for lease in balloon["device"]] == ["vga"]
    assert [lease["owner"] for lease in balloon["dma"]] == ["ide0", "ahci0", "e1000"]
    assert [lease["stale"] for lease in balloon["dma"]] == [True] * 3
    assert facts["finish"] == {"video_stale": False, "stale_releases_logged": 3}


def test_outcomes_by_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """What the disk wrote is lost, arrives with "copy", and all others fare the same."""
    outcomes = {
        policy: {row["owner"]: row["outcome"] for row in rows}
        for policy, rows in story(capsys)["outcomes"].items()
    }
    assert outcomes["warn"] == {
        "vga": "arrived",
        "ide0": "LOST",
        "ahci0": "arrived",
        "e1000": "OLD DATA",
        "(plain read)": "arrived",
    }
    assert outcomes["copy"] == outcomes["warn"] | {"ide0": "arrived"}


def test_stats_count_the_stale_releases(capsys: pytest.CaptureFixture[str]) -> None:
    """The counters of both caches show the burst and the three stale releases."""
    stats = story(capsys)["stats"]
    assert stats["warn"]["invalidations"] == stats["copy"]["invalidations"] == 13
    assert stats["warn"]["stale_dma_released"] == stats["copy"]["stale_dma_released"] == 3


def test_tables_say_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    """For people there are five titled steps, the warnings' table, and each outcome."""
    text = play(capsys)
    assert re.findall(r"(?m)^\d\. ", text) == [f"{number}. " for number in range(1, 6)]
    assert re.search(r"may be lost  ide0 +0x500e00 +0x200  from-device +\d+\.\d{3} s", text)
    assert re.search(r"ide0 .*zeros +LOST\n", text)
    assert re.search(r"ide0 .*disk sector +disk sector +arrived\n", text)
    assert "3 warnings logged for 13 requests" in text
    assert not re.search(r"(?m) $", text)


def test_output_is_the_same_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs differ in nothing but ages."""
    first, second = (AGE.sub("AGE", play(capsys)) for _ in range(2))
    assert first == second


def test_json_needs_no_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json the demo runs where rich is not installed."""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert set(story(capsys)) == {"leases", "balloon", "finish", "outcomes", "stats"}


def test_logging_is_left_as_it_was(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The library's warnings go to the story only, and afterwards logging works as before."""
    logger = logging.getLogger("xenmapcache")
    before = logger.level, logger.propagate, logger.disabled, list(logger.handlers)
    with caplog.at_level(logging.WARNING):
        story(capsys)
    assert caplog.messages == []
    assert (logger.level, logger.propagate, logger.disabled, list(logger.handlers)) == before


def test_a_story_that_nobody_hears_to_its_end_leaves_nothing() -> None:
    """When the reader of a pipe has gone, caches and leases are ended, without a word."""
    gc.collect()
    before = live_mappings()
    for steps in range(1, 6):
        with recorded() as log, contextlib.closing(tell(log)) as told:
            for _ in zip(range(steps), told, strict=False):
                pass
        gc.collect()  # a cache that is dropped with leases warns
        assert live_mappings() == before


def test_a_drawing_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before the story begins."""
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "-o", str(tmp_path / "demo.png")])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "must end in .html or .svg" in printed.err
