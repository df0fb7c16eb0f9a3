"""``xenmapcache holders``: processes with guests' memory, in a tree like /proc."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Machine
from xenmapcache.cli import main
from xenmapcache.doctor import holders
from xenmapcache.doctor.holders import Hold, find_holders

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
PRIVCMD, GNTDEV = "/dev/xen/privcmd", "/dev/xen/gntdev"
LISTING = """cat <<'END'
Name                                        ID   Mem VCPUs      State   Time(s)
Domain-0                                     0  1024     2     r-----      62.5
(null)                                       3     0     1     --ps-d       4.2
(null)                                       4     0     1     --ps-d       4.2
web server                                   5   128     1     -b----       0.3
END"""


def process(
    machine: Machine,
    pid: int,
    *maps: tuple[int, str],
    name: str = "qemu-system-i38",
    opened: tuple[str, ...] = (),
    command: bytes = b"",
) -> Path:
    """Add a process; maps are lengths and files."""
    lines, address = [], 0x7F0000000000
    for length, file in maps:
        lines.append(f"{address:x}-{address + length:x} rw-s 00000000 00:05 12      {file}\n")
        address += length + 0x1000
    folder = machine.root / "proc" / str(pid)
    machine.write(f"proc/{pid}/maps", "".join(lines))
    machine.write(f"proc/{pid}/comm", f"{name}\n")
    (folder / "cmdline").write_bytes(command)
    (folder / "fd").mkdir()
    for number, file in enumerate(opened):
        (folder / "fd" / str(number)).symlink_to(file)
    return folder


def report(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["holders", "--json"]) == status
    printed = capsys.readouterr()
    assert printed.err == ""
    found: dict[str, Any] = json.loads(printed.out)
    return found


@pytest.fixture
def busy(machine: Machine) -> Machine:
    """A Dom0 with QEMU, another program, one that has only opened a node, and bystanders."""
    machine.install_xl(LISTING)
    process(
        machine,
        1200,
        (0x200000, PRIVCMD),
        (0x1000, "/lib/x86_64-linux-gnu/libc.so.6"),
        (0x100000, PRIVCMD),
        (0x1000, GNTDEV),
        opened=(PRIVCMD, PRIVCMD, GNTDEV, "/dev/null"),
        command=b"/usr/bin/qemu\0-xen-domid\0" + b"3\0-name\0web\0",
    )
    process(machine, 77, (0x1000, "/proc/xen/privcmd (deleted)"), name="xenstored")
    process(machine, 300, name="waits", opened=(PRIVCMD,))
    process(machine, 5, (0x1000, "/home/me/dev/xen/privcmd"), (0x1000, "/dev/xen/privcmd-buf"))
    machine.write("proc/self/maps", "nobody looks here")
    return machine


@pytest.mark.usefixtures("busy")
def test_processes_and_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes are told apart, mappings added up; files with like names are left out."""
    found = report(capsys)
    assert [each["pid"] for each in found["processes"]] == [77, 300, 1200]
    xenstored, waits, qemu = found["processes"]
    assert xenstored["holds"] == [
        {"device": "privcmd", "mappings": 1, "bytes": 0x1000, "descriptors": 0}
    ]
    assert waits["holds"] == [{"device": "privcmd", "mappings": 0, "bytes": 0, "descriptors": 1}]
    assert (qemu["name"], qemu["domid"]) == ("qemu-system-i38", 3)
    assert qemu["holds"] == [
        {"device": "gntdev", "mappings": 1, "bytes": 0x1000, "descriptors": 1},
        {"device": "privcmd", "mappings": 2, "bytes": 0x300000, "descriptors": 2},
    ]
    assert found["unreadable"] == 0
    assert found["xl_problem"] is None


@pytest.mark.usefixtures("busy")
def test_dying_domains_and_who_may_keep_them(capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU of another domain is not suspected; who maps nothing keeps nothing."""
    assert report(capsys)["dying"] == [
        {"domid": 3, "name": "(null)", "pids": [77, 1200]},
        {"domid": 4, "name": "(null)", "pids": [77]},
    ]


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
@pytest.mark.usefixtures("busy")
def test_the_page_shows_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/commands.md has the table of this tree, as it is printed."""
    assert main(["holders"]) == 0
    shown = f"```console\n# xenmapcache holders\n{capsys.readouterr().out}```\n"
    assert shown in PAGE.read_text(encoding="utf-8")


@pytest.mark.usefixtures("busy")
def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """And needs no library."""
    assert main(["holders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80
    assert lines[0].split() == ["PID", "DOMAIN", "DEVICE", "MAPPINGS", "SIZE", "OPEN", "NAME"]
    assert lines[1].split() == ["77", "?", "privcmd", "1", "4", "KiB", "0", "xenstored"]
    assert lines[4].split() == ["1200", "3", "privcmd", "2", "3", "MiB", "2", "qemu-system-i38"]
    assert lines[5:] == [
        "Domain 3, (null), is dying: may be kept by 77, 1200.",
        "Domain 4, (null), is dying: may be kept by 77.",
    ]


def test_names_are_escaped(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A process chooses its name, line ends and escape sequences too."""
    folder = process(machine, 9, (0x1000, PRIVCMD))
    (folder / "comm").write_bytes(b"\x1b[2J\nroot\xff\n")
    assert main(["holders"]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J\nroot\udcff" in out
    assert "\x1b" not in out


def test_nothing_is_found(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said, with why xl says nothing; a dying domain may be kept by the kernel."""
    (machine.root / "proc").mkdir()
    assert main(["holders"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "No process that this user can see holds guests' memory.",
        "Dying domains: none known: xl is not installed.",
    ]
    machine.install_xl(LISTING)
    assert main(["holders"]) == 1
    assert "Domain 4, (null), is dying: no process here is seen to keep it." in (
        capsys.readouterr().out
    )


def test_processes_that_end_or_are_secret(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first kind is left out, the second one counted; each step may find it so."""
    for pid in range(1, 9):
        process(machine, pid, (0x1000, PRIVCMD), opened=(PRIVCMD,))
    proc = machine.root / "proc"
    (proc / "1/maps").unlink()
    (proc / "2/comm").unlink()
    (proc / "3/cmdline").unlink()
    real_open, real_iterdir, real_readlink = Path.open, Path.iterdir, Path.readlink
    refused = {proc / "4/maps": PermissionError, proc / "5/maps": ProcessLookupError}
    refused[proc / "6/cmdline"] = refused[proc / "7/fd"] = PermissionError
    refused[proc / "8/fd/0"] = FileNotFoundError

    def check(path: Path) -> None:
        if path in refused:
            raise refused[path]

    def fake_open(path: Path, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as Path.open has it
        check(path)
        return real_open(path, *arguments, **options)

    def fake_iterdir(path: Path) -> Any:  # noqa: ANN401 - as Path.iterdir has it
        check(path)
        return real_iterdir(path)

    def fake_readlink(path: Path) -> Path:
        check(path)
        return real_readlink(path)

    monkeypatch.setattr(Path, "open", fake_open)
    monkeypatch.setattr(Path, "iterdir", fake_iterdir)
    monkeypatch.setattr(Path, "readlink", fake_readlink)
    found = find_holders(proc)
    assert found.unreadable == 1
    opened = {each.pid: each.holds for each in found.holders}
    assert opened == {
        6: (Hold("privcmd", 1, 0x1000, 1),),
        7: (Hold("privcmd", 1, 0x1000, None),),
        8: (Hold("privcmd", 1, 0x1000, 0),),
    }
    assert main(["holders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["7", "?", "privcmd", "1", "4", "KiB", "?", "qemu-system-i38"]
    assert "Processes that this user cannot look at: 1. That takes CAP_SYS_PTRACE: " in lines[-2]


@pytest.mark.parametrize("line", ["", "/xen/", "x-y rw-s 0 0 0 /dev/xen/privcmd"])
def test_lines_that_are_none(machine: Machine, line: str) -> None:
    """Lines in another form are skipped."""
    folder = process(machine, 1)
    (folder / "maps").write_text(f"{line}\n")
    assert find_holders(machine.root / "proc").holders == ()


@pytest.mark.parametrize("value", [b"", b"x", b"123456", b"-1"])
def test_command_lines_that_name_no_domain(machine: Machine, value: bytes) -> None:
    """A process can write anything there."""
    process(machine, 1, (0x1000, PRIVCMD), command=b"qemu\0-xen-domid\0" + value)
    (holder,) = find_holders(machine.root / "proc").holders
    assert holder.domid is None


def test_a_million_mappings_are_read_line_by_line(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of them are two numbers; a command line is read only in part."""
    folder = process(machine, 1, command=b"x" * (1 << 17) + b"\0-xen-domid\0" + b"3\0")
    line = f"7f0000000000-7f0000001000 rw-s 00000000 00:05 12 {PRIVCMD}\n"
    (folder / "maps").write_text(line * 1000)
    (holder,) = find_holders(machine.root / "proc").holders
    assert holder.holds == (Hold("privcmd", 1000, 1000 << 12, 0),)
    assert holder.domid is None
    monkeypatch.setattr(holders, "PROC", machine.root / "nowhere")
    with pytest.raises(FileNotFoundError):
        find_holders()


def test_this_process_is_seen_in_the_real_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's files have the form that is read: a file takes the node's place here."""
    executable = os.fsencode(Path("/proc/self/exe").resolve())
    monkeypatch.setattr(holders, "_NODES", {executable: "privcmd"})
    holder = holders._look(os.getpid(), Path("/proc/self"))
    if b"/xen/" not in executable:  # then its lines are not even split
        assert holder is None
    monkeypatch.setattr(holders, "_HINT", b"/")
    holder = holders._look(os.getpid(), Path("/proc/self"))
    assert holder is not None
    assert holder.keeps
    assert holder.holds[0].bytes >= 0x1000
