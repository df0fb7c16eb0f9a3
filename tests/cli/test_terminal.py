"""No escape sequence of others reaches a terminal or a log, and Ctrl-C leaves no traceback."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import xenmapcache.cli
from tests.cli.process import environment, on_terminal
from xenmapcache import ClosedError, CorruptImageError, MapCache, XenCallError, open_backend
from xenmapcache.cli import main
from xenmapcache.escape import LOGGERS, printable, printable_lines

EVIL = "a\x1b]0;OWNED\x07\x1b[31m\u202e.img"
SHOWN = r"a\x1b]0;OWNED\x07\x1b[31m\u202e.img"
PACKAGE = Path(xenmapcache.__file__).parent


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file whose name a terminal would obey, in the current folder; and one besides."""
    monkeypatch.chdir(tmp_path)
    Path(EVIL).write_bytes(bytes(8192))
    Path("plain.img").write_bytes(bytes(4096))
    return EVIL


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["info", f"raw:{EVIL}"], 0),
        (["info", EVIL], 2),
        (["info", f"raw:{EVIL}.absent"], 2),
        (["info", f"save:{EVIL}"], 2),
        (["info", f"coredump:{EVIL}"], 2),
        (["info", f"elfcore:{EVIL}"], 2),
        (["info", f"mock:{EVIL}"], 2),
        (["info", f"{EVIL}:0"], 2),
        (["diff", f"raw:{EVIL}", "raw:plain.img"], 1),
        (["find", f"raw:{EVIL}", EVIL, "--hex"], 2),
        (["read", f"raw:{EVIL}", EVIL], 2),
        (["info", "x", EVIL], 2),
        ([EVIL], 2),
        (["dump", "raw:plain.img", "-o", f"{EVIL}/out"], 2),
        (["dump", "raw:plain.img", "--format", EVIL, "-o", "x"], 2),
    ],
)
@pytest.mark.usefixtures("evil")
def test_names_do_not_reach_the_terminal_raw(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is printed of a name, by us or by argparse, is escaped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xenmapcache.cli._discard", lambda _: None)
        try:
            assert main(arguments) == status
        except SystemExit as exit_:
            assert exit_.code == status
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert all(each.isprintable() or each == "\n" for each in text)
    assert SHOWN.partition("]")[0] in text.replace("\\\\", "\\")


@pytest.mark.usefixtures("evil")
def test_progress_and_report_on_a_terminal_are_escaped() -> None:
    """The bar's title and the line about the finished file show the name, escaped."""
    shown, _ = on_terminal(
        *("dump", f"raw:{EVIL}", "-o", f"{EVIL}.out"),
        environment=environment(TERM="dumb", COLUMNS="200", NO_COLOR="1"),
        streams=("stdout", "stderr"),
    )
    assert b"OWNED" in shown
    assert b"\x1b]0" not in shown
    assert b"\x07" not in shown


def test_only_one_module_of_the_command_prints() -> None:
    """Everything printed goes through output.py; argparse's own through Parser._print_message."""
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name != "print", path
            assert not name.startswith(("sys.stdout.write", "sys.stderr.write")), path
            assert not name.startswith("sys.stdout.buffer"), path


def test_printable() -> None:
    """Text is unchanged; what is not text is written as Python does; long texts, too."""
    assert printable("plain \u00e4\u20ac") == "plain \u00e4\u20ac"
    assert printable("a\nb\t\x9b1m\udcff\u2028") == r"a\nb\t\x9b1m\udcff\u2028"
    assert printable_lines("a\x07\nb") == "a\\x07\nb"
    long = "x" * 200_000
    assert printable(long + "\x1b" + long) == long + r"\x1b" + long


def test_messages_of_exceptions_are_escaped() -> None:
    """A traceback goes to a terminal as well. The arguments stay as they are."""
    for error in (CorruptImageError(EVIL), ClosedError(EVIL), XenCallError("open", 3, 5, EVIL)):
        assert SHOWN in str(error)
        assert EVIL in (*error.args, getattr(error, "hint", ""))


# --- logs -----------------------------------------------------------------------------


def test_every_logger_of_the_package_is_escaped() -> None:
    """A module that gets a logger of another name would not be."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                used |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    assert used
    assert used <= set(LOGGERS)


@pytest.fixture
def log() -> io.StringIO:
    """What a program's handler writes."""
    return io.StringIO()


@pytest.mark.parametrize("name", LOGGERS)
def test_logs_are_escaped(name: str, log: io.StringIO) -> None:
    """Names, errors and tracebacks; numbers and other objects stay what they are."""
    handler = logging.StreamHandler(log)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.error("%s: %s: %r: %d: %.1f", EVIL, OSError(EVIL), OSError(EVIL), 3, 1.5)
        logger.error("no arguments")
        logger.error("%(name)s", {"name": EVIL})
        logger.handle(logging.makeLogRecord({"msg": "made elsewhere", "args": None, "levelno": 40}))
        try:
            raise OSError(EVIL)
        except OSError:
            logger.exception("%s", EVIL)
    finally:
        logger.removeHandler(handler)
    text = log.getvalue()
    assert all(each.isprintable() or each == "\n" for each in text)
    first, second, third, fourth, *trace = text.splitlines()
    assert first.startswith(f"{SHOWN}: {SHOWN}: OSError(")
    assert first.endswith(": 3: 1.5")
    assert (second, third, fourth) == ("no arguments", SHOWN, "made elsewhere")
    assert trace[1].startswith("Traceback")
    assert trace[-1] == f"OSError: {SHOWN}"


def test_an_exception_that_has_no_text_is_logged_all_the_same(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foreign code in the text of an exception cannot stop the call that logs."""

    def fail(_: object) -> list[str]:
        raise RuntimeError("a bug")

    handler = logging.StreamHandler(log)
    logger = logging.getLogger("xenmapcache")
    logger.addHandler(handler)
    monkeypatch.setattr("traceback.format_exception", fail)
    try:
        raise OSError(EVIL)
    except OSError:
        logger.exception("it failed")
    finally:
        logger.removeHandler(handler)
    assert log.getvalue() == "it failed\nOSError whose text cannot be shown\n"


def test_an_owners_name_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The owner of a lease is a name that others may have chosen."""
    with open_backend("mock", memory="1M") as backend:
        cache = MapCache(backend)
        cache.map_dma(0, 16, owner=EVIL)
        cache.close(force=True)
    assert "OWNED" in caplog.text
    assert "\x1b" not in caplog.text


# --- Ctrl-C ---------------------------------------------------------------------------


def run_code(code: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("point", ["argparse", "xenmapcache.mapping", "xenmapcache.cli.info"])
def test_an_interrupt_while_modules_are_imported_ends_quietly(point: str) -> None:
    """SIGINT in the middle of an import ends the process by that signal, without a word."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {point!r}:
            os.kill(os.getpid(), signal.SIGINT)
import xenmapcache_command
sys.meta_path.insert(0, Finder())
sys.argv = ["xenmapcache", "info", "mock:1M", "--json"]
sys.exit(xenmapcache_command.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_an_interrupt_between_the_handlers_ends_with_130() -> None:
    """Where the command's own handlers do not reach, the start's does."""
    code = """
import sys, xenmapcache_command, xenmapcache.cli
def interrupted():
    raise KeyboardInterrupt
xenmapcache.cli.main = interrupted
sys.exit(xenmapcache_command.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, b"")


DROPPED = """
import os, signal, sys, xenmapcache_command, xenmapcache.cli
class Finalized:
    def __del__(self):
        {statement}
def run():
    {handler}
    Finalized()
    signal.pause()
xenmapcache.cli.main = run
sys.exit(xenmapcache_command.main())
"""


@pytest.mark.parametrize(
    ("handler", "statement", "status"),
    [
        ("pass", "os.kill(os.getpid(), signal.SIGINT)", 130),
        ("signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))", "os.kill(os.getpid(), 1)", 129),
    ],
    ids=["SIGINT", "SIGHUP"],
)
def test_a_signal_in_a_finalizer_ends_the_command(
    handler: str, statement: str, status: int
) -> None:
    """CPython drops what its handler raises there: it is raised again, without a word."""
    done = subprocess.run(
        [sys.executable, "-c", DROPPED.format(handler=handler, statement=statement)],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, b"")


def test_other_errors_in_a_finalizer_are_printed() -> None:
    """A signal did not cause them. They are printed as before, and the command goes on."""
    text = DROPPED.format(handler="pass", statement="1 / 0").replace("signal.pause()", "return 7")
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 7
    assert b"Exception ignored " in done.stderr
    assert b"ZeroDivisionError" in done.stderr


def test_a_background_job_ignores_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored; it stays ignored."""
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import sys, xenmapcache_command
os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["xenmapcache", "info", "mock:1M", "--json"]
status = xenmapcache_command.main()
os.kill(os.getpid(), signal.SIGINT)
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["pages"] == 256


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_it_dumps_leave_no_part(tmp_path: Path, number: signal.Signals) -> None:
    """From the first byte on: no traceback, and no file of a part."""
    out = tmp_path / "out"
    code = "import sys, xenmapcache_command; sys.exit(xenmapcache_command.main())"
    command = [sys.executable, "-c", code, "dump", "mock:16M", "-o", str(out)]
    for delay in (0.0, 0.02, 0.05):
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
            started = time.monotonic()
            while time.monotonic() - started < 60:  # until it has opened the file, or ended
                time.sleep(0.005)
                if process.poll() is not None or _has_output_open(process.pid, tmp_path):
                    break
            time.sleep(delay)  # any moment is right
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read()
        assert b"Traceback" not in said
        assert not [name for name in os.listdir(tmp_path) if name != "out"]


def _has_output_open(pid: int, folder: Path) -> bool:
    try:
        fds = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return any(name.startswith(str(folder)) for name in fds)
