"""``xenmapcache doctor`` on machines that lack this or that."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import xenmapcache.doctor
from tests.cli.conftest import Machine
from tests.cli.process import MODULE, environment
from tests.fake_xen import DOMID
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import Backend, ClosedError, MockHypervisor, XenCallError, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import handle, libc
from xenmapcache.binding import library as binding_library
from xenmapcache.binding.declarations import (
    CONTROL,
    DEVICE_MODEL,
    EVENT_CHANNEL,
    FOREIGN_MEMORY,
    TOOL_CORE,
    Library,
)
from xenmapcache.cli import main
from xenmapcache.doctor import guest, libraries
from xenmapcache.errors import errno_name

Findings = dict[str, dict[str, Any]]
Symbols = tuple[dict[str, str], list[str]]

SYMBOLS: dict[tuple[object, ...], Symbols] = {}
"""Of each library's file, as it was read first: pyelftools needs a while for each."""


@pytest.fixture(autouse=True)
def each_library_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what pyelftools has read, if it is there, of a file that has not changed."""
    read = libraries._symbol_versions

    def remembered(path: str) -> Symbols:
        if sys.modules.get("elftools", sys) is None or not Path(path).exists():
            return read(path)
        state = Path(path).stat()
        key = (path, state.st_ino, state.st_size, state.st_mtime_ns)
        if key not in SYMBOLS:
            SYMBOLS[key] = read(path)
        return SYMBOLS[key]

    monkeypatch.setattr(libraries, "_symbol_versions", remembered)


def examine(capsys: pytest.CaptureFixture[str], *options: str, status: int = 1) -> Findings:
    """Run the doctor with --json; return its findings by subject."""
    assert main(["doctor", "--json", *options]) == status
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert report["ready"] is (status == 0)
    return {finding["subject"]: finding for finding in report["findings"]}


def open_fake(
    there: int, holes: Iterable[tuple[int, int]] = (), memory: str = "32M"
) -> Callable[[str, int], Backend]:
    """Return an open_backend() that opens a mock guest, if it is asked for that domid."""
    guest = MockHypervisor().create_domain(memory=memory, holes=holes)

    def opener(name: str, domid: int) -> Backend:
        if domid != there:
            raise XenCallError("fake_map", domid, 3, "there is no such domain")
        return open_backend("mock", domain=guest)

    return opener


@pytest.mark.usefixtures("machine")
def test_each_problem_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    """Off Xen it names what is missing, each with its remedy, and ends with status 1."""
    findings = examine(capsys)
    lacking = {name: each for name, each in findings.items() if each["state"] != "ok"}
    assert all(each["remedy"] and "\n" not in each["remedy"] for each in lacking.values())
    assert {"hypervisor", "guest"} <= set(lacking)
    assert "modprobe xen-privcmd" in next(
        each["remedy"] for name, each in lacking.items() if name.endswith("dev/xen/privcmd")
    )
    assert "xl is not installed" in findings["guest"]["text"]
    assert "--domid" in findings["guest"]["remedy"]


@pytest.mark.usefixtures("machine")
def test_plain_report_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the same is shown in sections, remedies marked, verdict last."""
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.isascii()
    for section in ("Python", "Libraries", "Devices", "Xen", "Live guest"):
        assert f"\n{section}\n" in printed.out
    assert "-> modprobe xen-privcmd" in printed.out
    assert "No live guest was mapped" in printed.out.splitlines()[-2]


@pytest.mark.usefixtures("machine")
def test_backends_tell_why_they_cannot_open(capsys: pytest.CaptureFixture[str]) -> None:
    """With --domid both backends are tried, and what they raise becomes text and remedy."""
    if handle.Handle.nodes[0].exists():
        pytest.skip("this is a Xen host: its libraries do open")
    findings = examine(capsys, "--domid", "5")
    for name in ("xen", "xenctrl"):
        finding = findings[f"backend '{name}'"]
        assert finding["state"] == "problem"
        assert finding["text"]
        assert finding["remedy"]


# --- libraries ------------------------------------------------------------------------


def foreign_memory(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what the doctor finds of libxenforeignmemory, or skip without one."""
    finding = examine(capsys)["libxenforeignmemory"]
    if not finding["details"]["found"]:
        pytest.skip("libxenforeignmemory is not installed (Debian: libxenforeignmemory1)")
    return finding


@pytest.mark.usefixtures("machine")
def test_real_library_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an installed library it tells the real file and which version brought each function."""
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    details = foreign_memory(capsys)["details"]
    path = Path(details["path"])
    assert path.name.startswith("libxenforeignmemory.so.1")
    assert path == path.resolve()
    assert details["versions"][0] == "VERS_1.0"
    assert details["functions"]["xenforeignmemory_map"] == "VERS_1.0"
    if "xenforeignmemory_map2" in details["functions"]:
        assert details["functions"]["xenforeignmemory_map2"] == "VERS_1.2"


@pytest.mark.usefixtures("machine")
def test_without_pyelftools_versions_are_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where pyelftools is missing it says so with the remedy, and all else works."""
    for name in [name for name in sys.modules if name.split(".")[0] == "elftools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "elftools", None)
    finding = examine(capsys)["symbol versions"]
    assert finding["state"] == "note"
    assert finding["remedy"] == "pip install xenmapcache[elf]"
    assert foreign_memory(capsys)["details"]["versions"] == []


@pytest.mark.usefixtures("machine")
def test_no_libraries_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no library of Xen is installed, it names the package of each."""
    gone = [
        each if each is CONTROL else each._replace(soname=f"libgone-{each.name}.so.1")
        for each in libraries.LIBRARIES
    ]
    monkeypatch.setattr(libraries, "LIBRARIES", tuple(gone))
    monkeypatch.setattr(binding_library, "library_folders", list)
    findings = examine(capsys)
    states = {}
    for library in libraries.LIBRARIES:
        assert "not found" in findings[library.name]["text"]
        assert library.package in findings[library.name]["remedy"]
        states[library.name] = findings[library.name]["state"]
    # Only the first is needed by the backend that people use.
    assert states == {
        "libxenforeignmemory": "problem",
        "libxenctrl": "note",
        "libxendevicemodel": "note",
        "libxenevtchn": "note",
        "libxentoolcore": "note",
        "libxentoollog": "note",
    }
    # Of those that only few need, it tells for what.
    for name in ("libxendevicemodel", "libxenevtchn", "libxentoolcore"):
        assert findings[name]["remedy"].startswith("for device models")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("library", "needed"),
    [
        (DEVICE_MODEL, "xendevicemodel_modified_memory"),
        (EVENT_CHANNEL, "xenevtchn_pending"),
        (TOOL_CORE, "xentoolcore_restrict_all"),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_libraries_of_device_models(
    make_fake: MakeFake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: Library,
    needed: str,
) -> None:
    """They are described; and where one is another library, that is a note which says so."""
    there, wrong = make_fake().library, make_fake("WRONG").library
    monkeypatch.setattr(libraries, "LIBRARIES", (FOREIGN_MEMORY, library._replace(soname=there)))
    finding = examine(capsys)[library.name]
    assert finding["state"] == "ok"
    assert needed in finding["details"]["functions"]
    monkeypatch.setattr(libraries, "LIBRARIES", (FOREIGN_MEMORY, library._replace(soname=wrong)))
    finding = examine(capsys)[library.name]
    assert finding["state"] == "note"
    assert finding["details"]["missing"] == [needed]
    assert f"this is not {library.name}" in finding["remedy"]


@pytest.mark.usefixtures("machine")
def test_wrong_library_lacks_functions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library of that name that is another one is a problem that lists the missing functions."""
    wrong = FOREIGN_MEMORY._replace(soname="libc.so.6")
    monkeypatch.setattr(libraries, "LIBRARIES", (wrong,))
    finding = examine(capsys)["libxenforeignmemory"]
    assert finding["state"] == "problem"
    assert "xenforeignmemory_map2" in finding["details"]["missing"]
    assert "0 of 9 functions" in finding["text"]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("declared", "lacks"),
    [
        (FOREIGN_MEMORY, "xenforeignmemory_map2"),
        (DEVICE_MODEL, "xendevicemodel_modified_memory_bulk"),
    ],
    ids=["libxenforeignmemory", "libxendevicemodel"],
)
def test_old_library_is_only_noted(
    make_fake: MakeFake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    declared: Library,
    lacks: str,
) -> None:
    """Functions of a newer Xen that can be done without are a note, and are named."""
    library = make_fake("OLD").library
    monkeypatch.setattr(libraries, "LIBRARIES", (declared._replace(soname=library),))
    finding = examine(capsys)[declared.name]
    assert finding["state"] == "note"
    assert finding["remedy"] == "a newer Xen has them"
    assert lacks in finding["details"]["missing"]
    assert finding["text"].startswith(f"{library}, unversioned, ")


def test_broken_library_file_gives_no_traceback(tmp_path: Path) -> None:
    """A file that is not a library, first in LD_LIBRARY_PATH, is reported and nothing is raised."""
    for name in ("libxenforeignmemory.so.1", "libxenctrl.so.4.99", "libxentoollog.so.1"):
        (tmp_path / name).write_bytes(b"\x7fELF, or not")
    run = subprocess.run(
        [*MODULE, "doctor", "--domid", "32751"],
        capture_output=True,
        text=True,
        env=environment(LD_LIBRARY_PATH=str(tmp_path)),
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert "problem  libxenforeignmemory  not found" in run.stdout
    assert "libxenforeignmemory1" in run.stdout


# --- Python, devices, Xen -------------------------------------------------------------


@pytest.mark.usefixtures("machine")
def test_binding_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without cffi it says that ctypes is used, and why."""
    monkeypatch.setitem(sys.modules, "xenmapcache.binding.cffi_loader", None)
    finding = examine(capsys)["binding"]
    assert finding["details"] == {"name": "ctypes"}
    assert "cannot be imported" in finding["text"]
    assert "pip install cffi" in finding["remedy"]


def test_device_nodes_tell_owner_and_mode(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that opens is shown with mode and owner."""
    machine.become_dom0()
    node = machine.root / "dev/xen/privcmd"
    node.chmod(0o640)
    finding = examine(capsys)[str(node)]
    assert finding["state"] == "ok"
    assert finding["details"] == {"exists": True, "mode": "0640", "opens": True}
    assert finding["text"].startswith("-rw-r-----")


def test_an_owner_without_a_name(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of a user that this system does not know of is shown with his number."""
    machine.become_dom0()
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    text = examine(capsys)[str(machine.root / "dev/xen/privcmd")]["text"]
    assert f" {os.getuid()}:" in text


def test_a_function_in_no_file() -> None:
    """Where a loaded function is in no file that the kernel names, its address is told."""
    address = libc.allocate(PAGE_SIZE)
    handle = SimpleNamespace(open=ctypes.CFUNCTYPE(None)(address))
    assert libraries._file_of(handle, "open") == f"in memory at {address:#x}"  # type: ignore[arg-type] # enough of a CDLL
    libc.unmap(address, PAGE_SIZE)


@pytest.mark.parametrize(
    ("uid", "number", "remedy"),
    [
        (1000, errno.EACCES, "run as root in Dom0"),
        (0, errno.EPERM, "root is refused by device rules, as those of a container"),
        (0, errno.EACCES, "root is refused by a security module (SELinux, AppArmor)"),
        (0, errno.ENXIO, "modprobe xen-privcmd, in Dom0"),
    ],
)
def test_node_that_does_not_open_is_a_problem(
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    number: int,
    remedy: str,
) -> None:
    """Without permission for the node the remedy is root in Dom0; for root, what refuses it."""
    machine.become_dom0()
    real_open = os.open

    def refuse(path: Path, flags: int) -> int:
        if path.name == "privcmd":
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    finding = examine(capsys)[str(machine.root / "dev/xen/privcmd")]
    assert finding["state"] == "problem"
    assert os.strerror(number) in finding["text"]
    assert finding["remedy"].startswith(remedy)
    assert ("as root" in finding["remedy"]) == (uid != 0)


def test_old_node_will_do(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only /proc/xen/privcmd exists, the missing new one is a note."""
    machine.write("proc/xen/privcmd")
    findings = examine(capsys)
    assert findings[str(machine.root / "proc/xen/privcmd")]["state"] == "ok"
    assert findings[str(machine.root / "dev/xen/privcmd")]["state"] == "note"


@pytest.mark.parametrize("dom0", [False, True])
def test_event_channels_node_is_a_note(
    machine: Machine, capsys: pytest.CaptureFixture[str], dom0: bool
) -> None:
    """Without the node of event channels a guest is mapped all the same: device models need it."""
    if dom0:
        machine.become_dom0()
    finding = examine(capsys)[str(machine.root / "dev/xen/evtchn")]
    assert finding["state"] == ("ok" if dom0 else "note")
    if not dom0:
        assert finding["remedy"] == "needed for device models: modprobe xen-evtchn"


def test_dom0_is_recognised(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """In Dom0 it tells Xen's version and kind of domain, and finds control_d."""
    machine.become_dom0()
    findings = examine(capsys)
    assert findings["hypervisor"]["text"] == "Xen 4.17.3, this domain is PV"
    assert findings[str(machine.root / "proc/xen/capabilities")]["state"] == "ok"


def test_a_guest_is_not_dom0(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """In a guest, and under another hypervisor, it says that this is not the place."""
    machine.become_dom0()
    machine.write("proc/xen/capabilities", "\n")
    finding = examine(capsys)[str(machine.root / "proc/xen/capabilities")]
    assert (finding["state"], "Dom0" in finding["remedy"]) == ("problem", True)
    machine.write("sys/hypervisor/type", "kvm\n")
    assert "this is kvm, not Xen" in examine(capsys)["hypervisor"]["text"]


# --- a live guest ---------------------------------------------------------------------

LISTING = """cat <<END
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     2     r-----      11.4
a guest with 1 name                          7   128     1     -b----       2.2
other                                        9   128     1     -b----       2.2
END"""


def test_first_guest_of_xl_is_mapped(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --domid the first guest of ``xl list`` is mapped by both backends: status 0."""
    machine.become_dom0()
    machine.install_xl(LISTING)
    monkeypatch.setattr(guest, "open_backend", open_fake(7))
    findings = examine(capsys, status=0)
    assert findings["guest"]["details"] == {"domid": 7}
    assert "a guest with 1 name" in findings["guest"]["text"]
    for name in ("xen", "xenctrl"):
        assert findings[f"backend '{name}'"]["text"] == "mapped gfn 0x0, read 4096 bytes"
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("A live guest was mapped.")


@pytest.mark.usefixtures("machine")
def test_both_backends_map_through_their_libraries(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a stand-in for Xen's libraries each backend really makes its own map call."""
    fake = make_fake()

    def opener(name: str, domid: int) -> Backend:
        return open_backend(name, domid=domid, library=fake.library)

    monkeypatch.setattr(guest, "open_backend", opener)
    findings = examine(capsys, "--domid", str(DOMID), status=0)
    for name, call in (("xen", "xenforeignmemory_map2"), ("xenctrl", "xc_map_foreign_bulk")):
        assert findings[f"backend '{name}'"]["state"] == "ok"
        assert fake.count(call) == 2  # one to see that there is such a domain
    assert fake.count("xenforeignmemory_close") == fake.count("xc_interface_close") == 1


def test_hole_at_the_first_page_is_passed_over(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest without its first page is live all the same."""
    monkeypatch.setattr(guest, "open_backend", open_fake(7, holes=[(0, 0x1000)]))
    findings = examine(capsys, "--domid", "7", status=0)
    assert findings["backend 'xen'"]["details"] == {"mapped": True, "gfn": 0x100}


def test_guest_without_pages_is_a_problem(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no page can be mapped the last fault is shown, with a remedy."""
    monkeypatch.setattr(guest, "open_backend", open_fake(7, holes=[(0, 32 << 20)]))
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert "no page at 0x40000000" in finding["text"]
    assert finding["remedy"]


def test_an_arm_guest_is_mapped_where_it_has_memory(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 1 GiB it has none."""
    monkeypatch.setattr(guest, "open_backend", open_fake(7, memory="1025M", holes=[(0, 1 << 30)]))
    findings = examine(capsys, "--domid", "7", status=0)
    assert findings["backend 'xen'"]["details"] == {"mapped": True, "gfn": 0x40000}


def test_no_such_guest_is_a_problem_with_xens_hint(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call that Xen refused, the errno is the text and the hint the remedy."""
    monkeypatch.setattr(guest, "open_backend", open_fake(7))
    finding = examine(capsys, "--domid", "8")["backend 'xen'"]
    assert finding["text"].endswith("ESRCH (No such process)")
    assert finding["remedy"] == "there is no such domain"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo 'xl: no daemon' >&2; exit 3", "failed with status 3: xl: no daemon"),
        ("echo; echo nonsense; printf '\\377 x'", "none is running"),
    ],
)
def test_xl_that_fails_is_shown(
    script: str, text: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever xl says, it is reported and nothing is raised."""
    machine.install_xl(script)
    assert text in examine(capsys)["guest"]["text"]


def test_xl_that_does_not_start(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that the system cannot run is reported with its reason."""
    machine.write("bin/xl", "\x7fELF").chmod(0o755)
    text = examine(capsys)["guest"]["text"]
    assert "xl list failed: [Errno 8] Exec format error" in text


def test_unforeseen_errors_are_findings(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that breaks is a finding of its own; the other checks still run."""

    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("the unforeseen")

    monkeypatch.setattr(guest, "open_backend", broken)
    monkeypatch.setattr(libraries, "find_library", broken)
    findings = examine(capsys, "--domid", "7")
    for subject in ("libxenforeignmemory", "backend 'xen'", "backend 'xenctrl'"):
        assert findings[subject]["text"] == "the check failed: RuntimeError: the unforeseen"
    assert findings["hypervisor"]["remedy"]


DYING = """cat <<END
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     2     r-----      11.4
(null)                                       7     6     1     --p--d       2.2
END"""


def test_a_dying_guest_is_called_dying(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xen says the same of it as of a PV guest; xl list knows, and /proc says who maps it."""
    machine.install_xl(DYING)
    machine.write("proc/12/maps", "7f00-9f00 rw-s 00000000 00:05 12 /dev/xen/privcmd\n")
    machine.write("proc/12/comm", "qemu-system-i38\n")
    machine.write("proc/12/cmdline")
    (machine.root / "proc/12/fd").mkdir()
    for name in ("maps", "comm", "cmdline"):
        machine.write(f"proc/13/{name}")
    (machine.root / "proc/13/fd").mkdir()
    (machine.root / "proc/13/fd/3").symlink_to("/dev/xen/privcmd")  # opened, not mapped
    machine.write("proc/3/maps", "7f00 r-xp 00000000 00:05 12 /bin/sh\n")
    monkeypatch.setattr(guest, "open_backend", open_fake(7, holes=[(0, 32 << 20)]))
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["text"].startswith("domain 7 is dying: it was destroyed")
    assert finding["remedy"].endswith("processes with foreign memory: 12 (qemu-system-i38)")
    (machine.root / "proc/12/maps").unlink()
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["remedy"].endswith("none that this user can see")


def test_dying_guests_are_skipped(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first guest that lives is mapped; if all are dying, the report says that."""
    machine.become_dom0()
    machine.install_xl(DYING.removesuffix("END") + LISTING.splitlines()[4] + "\nEND")
    monkeypatch.setattr(guest, "open_backend", open_fake(9))
    assert examine(capsys, status=0)["guest"]["details"] == {"domid": 9}
    machine.install_xl(DYING)
    finding = examine(capsys)["guest"]
    assert finding["text"] == "none is running, according to xl list; dying: 7"


@pytest.mark.parametrize(
    ("number", "kind", "flask", "remedy"),
    [
        (errno.EACCES, "pvh", True, r"policy \(XSM, Flask\) forbids it.*says Enforcing"),
        (errno.EPERM, "hvm", False, r"policy \(XSM\) forbids it.*not privileged"),
        (errno.EPERM, "pv", False, "^a PV guest has no guest-physical memory"),
        (errno.ENOSYS, "pvh", True, "does not have that call"),
    ],
)
def test_a_policy_is_named(
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make_fake: MakeFake,
    number: int,
    kind: str,
    flask: bool,
    remedy: str,
) -> None:
    """Pages that Xen refuses are not those of a PV guest, unless the toolstack says that it is."""
    fake = make_fake()
    for gfn in range(64):
        fake.set_error(number, gfn)
    machine.install_xl("echo Enforcing" if flask else "exit 1")
    monkeypatch.setattr(guest, "guest_type", lambda domid: kind if domid == DOMID else None)
    monkeypatch.setattr(
        guest,
        "open_backend",
        lambda name, domid: open_backend(name, domid=domid, library=fake.library),
    )
    findings = examine(capsys, "--domid", str(DOMID))
    for name in ("xen", "xenctrl"):
        finding = findings[f"backend '{name}'"]
        assert finding["text"].endswith(f"with {errno_name(number)}")
        assert "at 0x0" in finding["text"]
        assert re.search(remedy, finding["remedy"])
        assert ("PV" in finding["remedy"]) == (kind == "pv")


def test_a_guest_that_shows_no_page_may_be_pv(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not dying is probably PV, but not on Arm."""
    machine.install_xl(LISTING)
    monkeypatch.setattr(guest, "HAS_PV", True)
    monkeypatch.setattr(guest, "open_backend", open_fake(7, holes=[(0, 32 << 20)]))
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["text"].startswith("domain 7 shows no page: no page at 0x40000000")
    assert finding["remedy"] == "a PV guest has no guest-physical memory; use a PVH or HVM guest"
    monkeypatch.setattr(guest, "guest_type", lambda _: "pvh")
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["text"].startswith("domain 7, which is PVH, shows no page")
    assert "PV guest" not in finding["remedy"]
    monkeypatch.setattr(guest, "guest_type", lambda _: None)
    monkeypatch.setattr(guest, "HAS_PV", False)
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["text"].startswith("domain 7 shows no page where most guests have memory")
    assert "PV guest" not in finding["remedy"]


def test_another_error_of_the_package_has_a_remedy(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that no case foresees lead to the documentation."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise ClosedError("closed before it was used")

    monkeypatch.setattr(guest, "open_backend", refuse)
    finding = examine(capsys, "--domid", "7")["backend 'xen'"]
    assert finding["text"] == "closed before it was used"
    assert "troubleshooting" in finding["remedy"]


def test_info_of_a_live_guest_without_memory_says_why(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero pages alone would tell nothing."""
    machine.install_xl(DYING)
    domain = MockHypervisor().create_domain(memory="1M", holes=[(0, 1 << 20)])
    backend = open_backend("mock", domain=domain)
    monkeypatch.setattr(type(backend), "name", "xen")
    backend.domid = 7  # type: ignore[attr-defined] # a MockBackend
    monkeypatch.setattr("xenmapcache.cli.sources.open_backend", lambda *_, **__: backend)
    assert main(["info", "xen:7", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes["no_memory"].startswith("domain 7 is dying")


def test_checks_are_called_from_python(machine: Machine) -> None:
    """The findings are data; nothing is printed."""
    found = {finding.subject: finding for finding in xenmapcache.doctor.examine(domid=5)}
    assert found["guest"].details == {"domid": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [("web", "'web' must be a domain's number; xl domid NAME prints it"), ("32752", "0..32751")],
)
def test_a_domid_that_cannot_be(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--domid", text])
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("machine")
def test_versions_that_cannot_be_read(
    make_fake: MakeFake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without pyelftools a library is not called unversioned."""
    library = make_fake("OLD").library
    declared = libraries.LIBRARIES[0]
    monkeypatch.setattr(libraries, "LIBRARIES", (declared._replace(soname=library),))
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    finding = examine(capsys)[declared.name]
    assert finding["text"].startswith(f"{library}, versions not shown, ")
