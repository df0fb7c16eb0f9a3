"""The command ``mount``, but for FUSE, which tests/adapters/test_mount_fuse.py has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.images.writers import memory
from xenmapcache import MapCache
from xenmapcache.adapters import mount
from xenmapcache.adapters.virtual_files import VirtualFile
from xenmapcache.cli import main

SIZES = {"memory.raw": 0x4000, "memory.elf": 0x6000, "memory.lime": 0x4020}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A flat image and a folder; FUSE mounts, and unmounts at once."""

    def serve(
        cache: MapCache,
        files: Sequence[VirtualFile],
        folder: Path,
        *,
        mounted: Callable[[], object],
    ) -> None:
        assert folder == tmp_path
        assert files[0].read(0, 0x4000) == cache.read(0, 0x4000)
        mounted()

    monkeypatch.setattr(mount, "serve", serve)
    monkeypatch.setattr(mount, "check_fuse", lambda _: None)
    (tmp_path / "raw").write_bytes(memory(0, 4))
    return ["mount", f"raw:{tmp_path / 'raw'}", str(tmp_path)]


def test_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The files and their sizes, when they can be read."""
    assert main([*arguments, "--foreground"]) == 0
    folder = arguments[-1]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/memory.raw: 16 KiB",
        f"{folder}/memory.elf: 24 KiB",
        f"{folder}/memory.lime: 16 KiB",
    ]


def test_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same, in bytes."""
    assert main([*arguments, "--json"]) == 0
    folder = arguments[-1]
    files = [{"file": f"{folder}/{name}", "size": size} for name, size in SIZES.items()]
    assert json.loads(capsys.readouterr().out) == {"folder": folder, "files": files}


def test_a_length_that_is_too_large(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is an error of the user."""
    assert main([*arguments, "--length", "0x20000000000000"]) == 2
    assert "beyond a 52-bit address space" in capsys.readouterr().err
