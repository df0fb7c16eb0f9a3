"""The command in a process of its own, also with a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-W", "error", "-m", "xenmapcache"]


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which this tree is imported."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


class Shown(NamedTuple):
    """What a command has written: to the terminal, and to a pipe in the place of stdout."""

    terminal: bytes
    stdout: bytes


def on_terminal(
    *arguments: str,
    environment: dict[str, str],
    streams: Sequence[str] = ("stdout",),
) -> Shown:
    """Run the command with a pseudo terminal as some of its streams; its status must be 0.

    A stream that is not named is a pipe if it is stdout, and that of the tests if it is stderr.
    """
    leader, follower = pty.openpty()
    try:
        with subprocess.Popen(
            [*MODULE, *arguments],
            stdout=follower if "stdout" in streams else subprocess.PIPE,
            stderr=follower if "stderr" in streams else None,
            env=environment,
        ) as process:
            os.close(follower)
            shown = b""
            try:
                while chunk := os.read(leader, 65536):
                    shown += chunk
            except OSError:
                pass  # Linux's way to say that the other side has closed
            piped = process.stdout.read() if process.stdout is not None else b""
            assert process.wait(60) == 0
    finally:
        os.close(leader)
    return Shown(shown, piped)
