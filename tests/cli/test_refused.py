"""Commands over a guest of which a page is refused: none of them skips it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from xenmapcache import MockHypervisor, open_backend
from xenmapcache.cli import main

PAGE = 0x9000
COMMANDS = {
    "info": ["info", "xen:7"],
    "info in JSON": ["info", "--json", "xen:7"],
    "read": ["read", "--raw", "xen:7", "0", "-n", "64K"],
    "read with zeros": ["read", "--raw", "--fill", "00", "xen:7", "0", "-n", "64K"],
    "find": ["find", "xen:7", "nothing"],
    "strings": ["strings", "xen:7"],
    "dump": ["dump", "xen:7", "-o", "guest.raw"],
    "dump as xl does": ["dump", "--format", "coredump", "xen:7", "-o", "guest.raw"],
    "dump for crash": ["dump", "--format", "vmcore", "xen:7", "-o", "guest.raw"],
    "dump as LiME": ["dump", "--format", "lime", "xen:7", "-o", "guest.raw"],
    "diff": ["diff", "xen:7", "xen:7"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_refused_page_ends_a_command(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The status is 2, stderr has the address and the remedy, and no file is left."""
    domain = MockHypervisor().create_domain(memory="1M", holes=[(0x5000, 0x1000)])
    domain.inject_fault("map", gfn=PAGE >> 12, errno=errno.EACCES, repeat=True)
    monkeypatch.setattr(
        "xenmapcache.cli.sources.open_backend", lambda *_, **__: open_backend("mock", domain=domain)
    )
    monkeypatch.chdir(tmp_path)
    assert main(COMMANDS[command]) == 2
    printed = capsys.readouterr()
    assert f"at {PAGE:#x} with EACCES" in printed.err
    assert "security policy (XSM, Flask) forbids it" in " ".join(printed.err.split())
    assert list(tmp_path.iterdir()) == []
