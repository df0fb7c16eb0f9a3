"""The project's own files agree: Makefile, .ci, pyproject.toml and the version."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import xenmapcache

from .test_docs import MAKEFILE, ROOT, needs_makefile

CI = ROOT / ".ci"
RULE = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
CALL = re.compile(r"\bmake ([a-z][a-z-]*)")
PYPROJECT = ROOT / "pyproject.toml"


def project() -> dict[str, Any]:
    with PYPROJECT.open("rb") as file:
        return tomllib.load(file)


@needs_makefile
def test_help_lists_each_target() -> None:
    """Each target of the Makefile is phony and has a comment, which `make help` prints."""
    text = MAKEFILE.read_text(encoding="utf-8")
    targets = RULE.findall(text)
    documented = re.findall(r"^([a-z][a-z-]*):.*  ## \w", text, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert sorted(targets) == sorted(documented) == sorted(" ".join(phony).split())
    assert targets[0] == "help"  # what plain `make` runs


@needs_makefile
@pytest.mark.skipif(not CI.is_dir(), reason=f"no folder {CI}")
def test_ci_calls_targets_that_exist() -> None:
    """Each `make TARGET` of the scripts in .ci is a target of the Makefile."""
    targets = set(RULE.findall(MAKEFILE.read_text(encoding="utf-8")))
    calls = {
        target
        for path in CI.iterdir()
        if path.is_file()
        for line in path.read_text(encoding="utf-8").splitlines()
        for target in CALL.findall(line.partition("#")[0])
    }
    assert {"lint", "types", "docs", "mutants", "bench", "release-check"} <= calls
    assert calls <= targets


@pytest.mark.skipif(not PYPROJECT.is_file(), reason=f"no file {PYPROJECT}")
def test_the_version_has_one_source() -> None:
    """The package holds the number; pyproject.toml, the metadata and the documentation take it."""
    settings = project()
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"] == {
        "version": {"attr": "xenmapcache.__version__"}
    }
    assert version("xenmapcache") == xenmapcache.__version__
    package = Path(xenmapcache.__file__).parent
    holders = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if f'"{xenmapcache.__version__}"' in path.read_text(encoding="utf-8")
    ]
    assert holders == [Path("__init__.py")]


@pytest.mark.skipif(not PYPROJECT.is_file(), reason=f"no file {PYPROJECT}")
def test_no_address_of_the_project_is_invented() -> None:
    """The metadata may be without addresses, but none has a name that is reserved for examples."""
    addresses = project()["project"].get("urls", {}).values()
    hosts = [urlsplit(address).hostname or "" for address in addresses]
    reserved = {"example", "invalid", "localhost", "test"}
    assert not [host for host in hosts if reserved & set(host.split("."))]
