"""Finding and opening the libraries: every way it can fail has an error that says what to do."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_xen import Behaviour, FakeXen, real_library
from tests.fake_xen.fixtures import MakeFake
from xenmapcache.binding import handle as handle_module
from xenmapcache.binding import library as library_module
from xenmapcache.binding.control import Control
from xenmapcache.binding.declarations import (
    CONTROL,
    FOREIGN_MEMORY,
    LIBRARIES,
    TOOL_CORE,
    Library,
    prototypes,
)
from xenmapcache.binding.devicemodel import DeviceModel
from xenmapcache.binding.eventchannel import EventChannels
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.granttable import GrantTable
from xenmapcache.binding.handle import Handle
from xenmapcache.binding.library import find_library, xen_version
from xenmapcache.binding.loader import get_loader
from xenmapcache.binding.toolcore import restrict_all
from xenmapcache.errors import BackendUnavailableError, UnsupportedOperationError

KINDS: tuple[type[Handle], ...] = (ForeignMemory, Control, DeviceModel, EventChannels, GrantTable)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.declared.name)
def kind(request: pytest.FixtureRequest) -> type[Handle]:
    """Each library that is opened."""
    chosen: type[Handle] = request.param
    return chosen


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes this look like a machine with a node, a Xen version, or neither."""

    def make(*, node: bool = False, version: str | None = None) -> Path:
        path = tmp_path / "node"
        if node:
            path.touch()
        for kind in KINDS:
            monkeypatch.setattr(kind, "nodes", (tmp_path / "absent", path))
        for module in (handle_module, library_module):
            monkeypatch.setattr(module, "xen_version", lambda: version)
        return path

    return make


def failure(kind: type[Handle], binding: str, library: str | None = None) -> str:
    """Return the message of an open that fails."""
    with pytest.raises(BackendUnavailableError) as caught:
        kind(binding=binding, library=library)
    return str(caught.value)


def test_no_library(kind: type[Handle], binding: str) -> None:
    """A file that is not there: its name, and the package to install."""
    message = failure(kind, binding, "/nowhere/lib.so")
    assert "/nowhere/lib.so cannot be loaded" in message
    assert kind.declared.package in message
    assert "library=" in message
    assert "LD_LIBRARY_PATH" in message
    assert "Debian" not in message


def test_library_of_something_else(kind: type[Handle], binding: str, make_fake: MakeFake) -> None:
    """A library that lacks a function that cannot be done without: which one."""
    fake = make_fake("WRONG")
    message = failure(kind, binding, fake.library)
    assert message.endswith(
        f"{fake.library} has no function {kind.required[0]}: it is not {kind.declared.name}"
    )
    assert fake.calls == []


def test_no_tool_core(binding: str, make_fake: MakeFake) -> None:
    """Without libxentoolcore, or with another library in its place, restricting says so."""
    with pytest.raises(
        BackendUnavailableError, match="/nowhere/lib.so cannot be loaded.*toolcore1"
    ):
        restrict_all(1, binding=binding, library="/nowhere/lib.so")
    wrong = make_fake("WRONG").library
    with pytest.raises(BackendUnavailableError, match="it is not libxentoolcore"):
        restrict_all(1, binding=binding, library=wrong)


@pytest.mark.parametrize(
    ("node", "version", "number", "expected"),
    [
        (False, None, errno.ENOENT, "there is no ABSENT: this is not a Xen host"),
        (True, None, errno.ENOENT, "this is not a Xen host"),
        (False, "4.17", errno.ENOENT, "there is no ABSENT: load the kernel module MODULE"),
        (True, "4.17", errno.EACCES, "no permission for NODE: run as root in Dom0"),
        (True, "4.17", errno.EPERM, "no permission for NODE: run as root in Dom0"),
        (True, "4.17", errno.ENODEV, "see the kernel's log, and try `xenmapcache doctor`"),
    ],
)
def test_failed_open_says_why(
    kind: type[Handle],
    fake: FakeXen,
    binding: str,
    host: Callable[..., Path],
    node: bool,
    version: str | None,
    number: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No Xen, no permission and anything else have a message each, which names call and errno."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = host(node=node, version=version)
    fake.plan(kind.open_call, Behaviour.FAIL, number)
    message = failure(kind, binding, fake.library)
    assert message.startswith(f"{kind.open_call} failed (")
    for word, meaning in (("NODE", path), ("ABSENT", kind.nodes[0]), ("MODULE", kind.module)):
        expected = expected.replace(word, str(meaning))
    assert expected in message
    assert fake.count(kind.close_call) == 0


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, "device rules, as those of a container"),
        (errno.EACCES, "a security module (SELinux, AppArmor)"),
    ],
)
def test_root_is_not_told_to_become_root(
    fake: FakeXen,
    binding: str,
    host: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: str,
) -> None:
    """What keeps root from a device node is a policy of this machine, and the message names it."""
    path = host(node=True, version="4.17")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    fake.plan("xenforeignmemory_open", Behaviour.FAIL, number)
    message = failure(ForeignMemory, binding, fake.library)
    assert f"no permission for {path}: root is refused by" in message
    assert expected in message
    assert "as root" not in message


NEWER: dict[str, Callable[[ForeignMemory], object]] = {
    "xenforeignmemory_restrict": lambda memory: memory.restrict(1),
    "xenforeignmemory_map2": lambda memory: memory.map(1, 1, array("Q", [1]), address=1 << 20),
    "xenforeignmemory_map_resource": lambda memory: memory.map_resource(1, 0, 0, 0, 1, 1),
    "xenforeignmemory_unmap_resource": lambda memory: memory.unmap_resource(1),
    "xenforeignmemory_resource_size": lambda memory: memory.resource_size(1, 0, 0),
}


@pytest.mark.parametrize("name", NEWER)
def test_missing_optional_function(make_fake: MakeFake, binding: str, name: str) -> None:
    """An old library opens; only using what it lacks raises, naming the function."""
    with ForeignMemory(binding=binding, library=make_fake("OLD").library) as memory:
        assert not memory.supports(name)
        assert memory.supports("xenforeignmemory_map")
        with pytest.raises(UnsupportedOperationError, match=f"no function {name}: a newer Xen"):
            NEWER[name](memory)


# --- which file --------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Path]]:
    """A function that puts empty libraries into folders of their own on the search path."""

    def make(*names: str) -> list[Path]:
        files = [tmp_path / str(number) / name for number, name in enumerate(names)]
        for file in files:
            file.parent.mkdir()
            file.touch()
        folders = [str(file.parent) for file in files]
        monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(["", str(tmp_path / "absent"), *folders]))
        return files

    return make


@pytest.mark.parametrize(
    ("running", "expected"), [("90.2", 1), ("90.10", 2), ("90.3", 2), (None, 2)]
)
def test_library_of_the_running_xen(
    installed: Callable[..., list[Path]],
    host: Callable[..., Path],
    running: str | None,
    expected: int,
) -> None:
    """Of several releases the running hypervisor's is taken, or else the newest, as numbers go."""
    host(version=running)
    names = ["90.9", "90.2", "90.10", "90.10.0", "90", "91.x"]
    files = installed(*(f"libxenctrl.so.{name}" for name in names))
    assert find_library(CONTROL) == str(files[expected])


def test_first_folder_wins(installed: Callable[..., list[Path]], host: Callable[..., Path]) -> None:
    """Of the same release in two folders the first is taken, as the dynamic linker does."""
    host()
    files = installed("libxenctrl.so.90.1", "libxenctrl.so.90.1")
    assert find_library(CONTROL) == str(files[0])


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error names the folders that were searched, and the package."""
    monkeypatch.setattr(library_module, "library_folders", lambda: [tmp_path])
    with pytest.raises(BackendUnavailableError) as caught:
        find_library(CONTROL)
    assert str(tmp_path) in str(caught.value)
    assert CONTROL.package in str(caught.value)


def test_stable_soname_is_left_to_the_linker() -> None:
    """A library whose name does not carry a release is not searched for."""
    assert find_library(FOREIGN_MEMORY) == "libxenforeignmemory.so.1"


def test_running_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is read from /sys/hypervisor, and is None without one."""
    monkeypatch.setattr(
        library_module,
        "Path",
        lambda *parts: tmp_path.joinpath(*(part.strip("/") for part in parts)),
    )
    assert xen_version() is None
    folder = tmp_path / "sys/hypervisor/version"
    folder.mkdir(parents=True)
    (folder / "major").write_text("4\n")
    (folder / "minor").write_text("17\n")
    assert xen_version() == "4.17"


# --- which loader -------------------------------------------------------------------

WITHOUT_CFFI = """
import logging, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("cffi", "_cffi_backend"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
from xenmapcache import open_backend
from xenmapcache.binding.loader import get_loader
backend = open_backend("mock", memory="1M")
assert backend.map(0, 1, writable=True).view(0, 4) == bytes(4)
print(get_loader().name)
try:
    get_loader("cffi")
except ImportError as error:
    print(error)
"""


def test_without_cffi() -> None:
    """Without cffi the package works through ctypes and says so; asked for by name, cffi raises."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CFFI], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["ctypes", "_cffi_backend is blocked"]
    assert done.stderr == (
        "xenmapcache.binding INFO cffi cannot be imported (_cffi_backend is blocked): "
        "binding through ctypes\n"
    )


def test_choice_of_loader() -> None:
    """Cffi is the default; each can be named; any other name is refused."""
    assert [get_loader(name).name for name in (None, "cffi", "ctypes")] == [
        "cffi",
        "cffi",
        "ctypes",
    ]
    with pytest.raises(ValueError, match="binding 'swig' is unknown: it is 'cffi' or 'ctypes'"):
        get_loader("swig")


def test_handle_takes_the_named_loader(memory: ForeignMemory, binding: str) -> None:
    """A handle tells which loader it was opened with."""
    assert memory.binding == binding


# --- Debian's real libraries ----------------------------------------------------------


@pytest.fixture
def off_xen() -> None:
    """Only where there is no Xen can the real libraries fail to find one."""
    if xen_version() is not None:
        pytest.skip("this is a Xen host")


@pytest.mark.usefixtures("off_xen")
def test_real_library_without_xen(
    kind: type[Handle],
    binding: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Off Xen it says that this is not a Xen host; Xen's complaint is logged, not printed."""
    real_library(kind.declared)
    caplog.set_level(logging.DEBUG, "xenmapcache.xen")
    message = failure(kind, binding)
    name = kind.nodes[0].name
    assert f"there is no /dev/xen/{name}: this is not a Xen host" in message
    assert f"load the kernel module xen-{name}" in message
    records = [record for record in caplog.records if record.name == "xenmapcache.xen"]
    if kind not in (EventChannels, GrantTable):  # which complain of nothing
        assert any("No such file or directory" in record.getMessage() for record in records)
    assert "No such file or directory" in message
    assert capfd.readouterr() == ("", "")


def test_real_restriction_of_nothing(binding: str) -> None:
    """The real libxentoolcore restricts all handles of a process that has none."""
    real_library(TOOL_CORE)
    command = (
        "from xenmapcache.binding.toolcore import restrict_all; "
        f"restrict_all(1, binding={binding!r})"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_all_declared_functions_are_in_the_real_library(library: Library, binding: str) -> None:
    """No declared function is misspelt or gone."""
    functions = get_loader(binding).open(library, real_library(library))
    assert functions.keys() == prototypes(library).keys() != set()
