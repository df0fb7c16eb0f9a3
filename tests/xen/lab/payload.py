"""The payload: what the host hands to Dom0, as one tar file that becomes Dom0's second disk.

It holds the wheel, the tests and the examples, but not the package's source: what is tested is
what would be installed. And the programs for guests, built, since Dom0 has no compiler.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from .platform import Platform
from .prerequisites import LabUnavailableError, tool

GUEST: Final = Path(__file__).parents[1] / "guest"
CARRIED: Final = ("tests", "examples", "pyproject.toml", "build_ffi.py", "README.md")
OPTIONAL: Final = {"test_drgn.py": "drgn>=0.1", "test_mount.py": "mfusepy>=3"}
"""Which package from PyPI the tests of a file need."""
PROGRAMS: Final = ("load",)
"""Of ``tests/xen/guest``, besides those of the architecture: plain C, for guests of any."""
LEFT_OUT: Final = ("__pycache__", ".*", "build", "dist", "*.egg-info", "venv", "node_modules")
INSTALL: Final = """#!/bin/sh -e
# No pip: it takes ten seconds to start under emulation, and there is nothing to resolve.
for wheel in /payload/*.whl; do
    python3 -m installer --no-compile-bytecode "$wheel"
done
"""
RUN: Final = """#!/bin/sh
cd /payload && exec python3 -m tests.xen.lab.supervisor "$1"
"""


def wheel(project: Path, folder: Path) -> Path:
    """Build the project's wheel into `folder`.

    Raises:
        LabUnavailableError: it cannot be built here.
    """
    # From a copy: setuptools leaves a build folder behind, and takes what an earlier one left.
    source = folder / "source"
    shutil.copytree(project, source, ignore=shutil.ignore_patterns(*LEFT_OUT, "tests", "docs"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    output = ""
    for options in (["--no-isolation"], []):  # offline where the build backend is here already
        done = subprocess.run(
            [*command, *options],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode == 0:
            shutil.rmtree(source)
            (built,) = folder.glob("*.whl")
            return built
        output = done.stdout
    tail = "\n".join(output.splitlines()[-15:])
    raise LabUnavailableError(f"the wheel cannot be built:\n{tail}")


def optional_wheels(platform: Platform, nodeids: Sequence[str], folder: Path) -> list[Path]:
    """Download what some tests need and Debian does not have, for Dom0's Python.

    Args:
        platform: of the Dom0.
        nodeids: of the tests.
        folder: for the wheels.

    Returns:
        The wheels; without those that cannot be downloaded, whose tests are skipped.
    """
    for file, package in OPTIONAL.items():
        if any(f"/{file}::" in nodeid for nodeid in nodeids):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
            command += [
                "--only-binary=:all:",
                "--python-version",
                platform.release.python,
                "--dest",
                str(folder),
            ]
            command += ["--platform", platform.architecture.wheel]
            subprocess.run(command, check=False)
    return sorted(folder.glob("*.whl"))


def programs(platform: Platform, folder: Path) -> list[Path]:
    """Build what tests put into guests, static: a guest has no libraries.

    Raises:
        LabUnavailableError: they cannot be built here.
    """
    built = []
    for name in (*platform.architecture.programs, *PROGRAMS):
        source, target = GUEST / f"{name}.c", folder / name
        command = [tool(platform.architecture.compiler), "-static", "-O1", "-std=gnu11"]
        command += ["-Wall", "-Wextra", "-Werror", "-o", str(target), str(source)]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise LabUnavailableError(f"{source.name} cannot be built:\n{done.stderr}")
        built.append(target)
    return built


def payload(
    project: Path,
    wheels: Sequence[Path],
    programs: Sequence[Path],
    order: Mapping[str, object],
    target: Path,
) -> Path:
    """Write the tar file `target`; `order` is what the supervisor is to do."""
    with tarfile.open(target, "w") as tar:
        for name in CARRIED:
            if (project / name).exists():
                tar.add(project / name, name, filter=_carried)
        for built in wheels:
            tar.add(built, built.name)
        for program in programs:
            tar.add(program, program.name, filter=_carried)
        _add(tar, "lab.json", json.dumps(dict(order)), 0o644)
        _add(tar, "install", INSTALL, 0o755)
        _add(tar, "run", RUN, 0o755)
    return target


def _carried(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    # Without owners: they mean nothing in Dom0.
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return None if "__pycache__" in Path(entry.name).parts else entry


def _add(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))
