"""The command ``disk``: what it prints, a guest that uses the disk, its ends, and its errors."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xenmapcache import Backend, MockDomain, MockHypervisor, backend, open_backend
from xenmapcache.cli import disk, main, output
from xenmapcache.devicemodel import guest_type, loops
from xenmapcache.mock.pci_driver import PciDriver
from xenmapcache.mock.virtio_driver import VirtioDriver

PVH, HVM = "0000:00:01.0", "0000:00:05.0"
READ = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="16M", type="pvh")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"a" * 512 + b"b" * 512)
    return path


@pytest.fixture(autouse=True)
def machine(guest: MockDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Dom0's guest be the mock's."""
    monkeypatch.setattr(loops, "_LOOK_S", 0.001)

    def open_guest(name: str) -> tuple[MockDomain, Backend]:
        assert name in ("web", "xen:web")
        return guest, open_backend("mock", domain=guest)

    monkeypatch.setattr(disk, "open_guest", open_guest)


@pytest.fixture
def use(
    guest: MockDomain, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[], object]], list[object]]]:
    """A function that has the guest do something when it is served."""
    threads: list[threading.Thread] = []
    shown = threading.Event()
    flush = output.flush

    def flush_and_tell() -> None:
        flush()
        shown.set()

    monkeypatch.setattr(disk, "flush", flush_and_tell)

    def start(work: Callable[[], object]) -> list[object]:
        seen: list[object] = []

        def run() -> None:
            assert shown.wait(20)
            try:
                seen.append(work())
            finally:
                guest.destroy()

        threads.append(threading.Thread(target=run))
        threads[0].start()
        return seen

    yield start
    for thread in threads:
        thread.join(20)


def read_sector(guest: MockDomain, bdf: str = PVH) -> bytes:
    """Read sector 1 as the guest's kernel does."""
    driver = VirtioDriver.over_pci(PciDriver(guest).find(bdf))
    driver.start()
    chain = driver.queues[0].add([READ], [512, 1])
    driver.queues[0].kick()
    return driver.queues[0].wait(chain).data


def stop_with(number: int) -> None:
    """Send a signal to the command; its guest asks for nothing then."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, number)


def test_a_guest_uses_the_disk(
    guest: MockDomain,
    path: Path,
    use: Callable[[Callable[[], object]], list[object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says what the guest needs, serves it, and ends with it."""
    seen = use(lambda: read_sector(guest))
    assert main(["disk", "web", str(path), "--serial", "s"]) == 0
    assert seen == [b"b" * 512 + b"\0"]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"domain 1: {path}, 1 KiB, at 0000:00:01.0",
        'the guest\'s configuration needs: extra = "... pci=noacpi"',
        "the guest was created by:        xl create -p FILE.cfg",
        "now run:                         xl unpause web",
    ]
    assert printed.err == "xenmapcache: note: domain 1 has ended\n"


def test_an_hvm_guest(
    guest: MockDomain,
    path: Path,
    use: Callable[[Callable[[], object]], list[object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has a bus of its own; the disk is beyond the slots that QEMU uses."""
    guest.type = "hvm"
    seen = use(lambda: guest.pci_read(HVM, 0))
    assert main(["disk", "xen:web", str(path), "--type", "hvm", "--json", "--read-only"]) == 0
    assert seen == [0x10421AF4]
    assert json.loads(capsys.readouterr().out) == {
        "domid": 1,
        "file": str(path),
        "sectors": 2,
        "read_only": True,
        "bdf": HVM,
        "kernel_arguments": "",
        "unpause": "xl unpause web",
    }


def test_an_hvm_guest_in_lines(
    guest: MockDomain,
    path: Path,
    use: Callable[[Callable[[], object]], list[object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its kernel needs no arguments; the place may be chosen."""
    guest.type = "hvm"
    seen = use(lambda: guest.pci_read("0000:00:07.0", 0))
    arguments = ["--type", "hvm", "--bdf", "0000:00:07.0"]
    assert main(["disk", "web", str(path), *arguments]) == 0
    assert seen == [0x10421AF4]
    assert "configuration needs" not in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it(
    guest: MockDomain,
    path: Path,
    use: Callable[[Callable[[], object]], list[object]],
    number: int,
    status: int,
) -> None:
    """The disk is closed in order; 130 is Ctrl-C, as of each command."""

    def stop() -> None:
        read_sector(guest)
        stop_with(number)

    use(stop)
    assert main(["disk", "web", str(path)]) == status


def test_it_is_started_again(
    guest: MockDomain,
    path: Path,
    use: Callable[[Callable[[], object]], list[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a record, the driver continues, and has noticed nothing."""
    stopped = threading.Event()

    def work() -> bytes:
        driver = VirtioDriver.over_pci(PciDriver(guest).find(PVH))
        driver.start()
        stop_with(signal.SIGTERM)
        assert stopped.wait(20)
        while driver.status != 15:
            os.sched_yield()
        chain = driver.queues[0].add([READ], [512, 1])
        driver.queues[0].kick()
        return driver.queues[0].wait(chain).data

    seen = use(work)
    arguments = ["disk", "web", str(path), "--record", str(path.with_suffix(".record"))]
    assert main(arguments) == 0
    assert not guest.ioreq_servers
    stopped.set()
    assert main(arguments) == 0
    assert seen == [b"b" * 512 + b"\0"]


def test_a_file_that_is_in_use(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two guests cannot write to one disk."""
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert main(["disk", "web", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"xenmapcache: error: {path} is in use by another process; two guests may share it with "
        "--read-only\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serial", "x" * 21], "serial must be at most 20 bytes of ASCII"),
        (["--bdf", "5.0"], "'5.0'"),
        (["--bdf", "0000:00:00.0"], "give 0000:00:01.0 to 0000:00:1f.0"),
        (["--bdf", "01:02.0"], "a PVH guest has one bus"),
        (["--bdf", "00:02.1"], "looks at function 0"),
    ],
)
def test_wrong_options(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Each is an error of the user, in one line."""
    assert main(["disk", "web", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_does_not_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has its name."""
    assert main(["disk", "web", f"{path}.no"]) == 2
    assert capsys.readouterr().err == f"xenmapcache: error: {path}.no: No such file or directory\n"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "the toolstack does not say what domain 7 is; give --type pvh or --type hvm"),
        ("pv", "domain 7 is a PV guest; only PVH and HVM guests have a PCI bus"),
    ],
)
def test_a_guest_without_a_bus(
    guest: MockDomain,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: str | None,
    message: str,
) -> None:
    """Nothing is served to a PV guest, nor to one of an unknown type."""
    monkeypatch.setattr(guest_type, "guest_type", lambda _: told)
    monkeypatch.setattr(disk, "open_guest", lambda _: (7, open_backend("mock", domain=guest)))
    assert main(["disk", "7", str(path)]) == 2
    assert capsys.readouterr().err == f"xenmapcache: error: {message}\n"


def test_an_arm_guest(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what serves an Arm guest, and nothing is claimed."""
    arm = MockHypervisor().create_domain(memory="16M", machine="arm64")
    monkeypatch.setattr(disk, "open_guest", lambda _: (arm, open_backend("mock", domain=arm)))
    assert main(["disk", "web", str(path)]) == 2
    assert capsys.readouterr().err == (
        "xenmapcache: error: this command makes a PCI device, and an Arm guest has no PCI bus "
        "here; serve it a VirtioBlock by VirtioMmio from Python (see docs/device-models-live.md, "
        "Arm)\n"
    )
    assert not arm.ioreq_servers


@pytest.mark.parametrize("name", ["7", "xen:7"])
def test_a_live_guest(guest: MockDomain, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A number or a name is that of a live guest."""
    monkeypatch.undo()
    opened: list[object] = []

    def open_one(name: str, **options: object) -> Backend:
        opened.append((name, options))
        return open_backend("mock", domain=guest)

    monkeypatch.setattr(backend, "open_backend", open_one)
    assert disk.open_guest(name)[0] == 7
    assert opened == [("xen", {"domid": 7})]
