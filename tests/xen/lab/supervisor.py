"""Dom0's side: runs pytest, outlives its crashes and hangs, and goes on with the tests after them.

Run in the payload's folder as `python3 -m tests.xen.lab.supervisor DOMID`, LAB_CHANNEL naming the
device to report to. Imports no pytest: it must stay cheap and must not crash with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, Final

FIXTURES: Final = ("victim", "agent")
SELECTION: Final = Path("/run/lab-selection.json")
TAIL: Final = 40


class Supervisor:
    """Runs the order in lab.json until every test has a verdict."""

    def __init__(self, domid: str, order: dict[str, Any], channel: IO[str]) -> None:
        self._domid = domid
        self._order = order
        self._channel = channel
        self._pending: list[str] = order["nodeids"]
        self._collect_errors: dict[str, str] = {}
        self._current = ""
        self._output: deque[str] = deque(maxlen=TAIL)

    def run(self) -> None:
        """Run pytest as often as it takes."""
        self._send(event="phase", name="tests")
        while self._pending:
            before = len(self._pending)
            ended, output = self._pytest()
            if self._current:
                text = f"{ended}; its last output:\n{output}"
                self._send(event="crash", nodeid=self._current, summary=ended, text=text)
                self._done(self._current)
                # The dead test's fixtures were not torn down.
                for name in FIXTURES:
                    subprocess.run(["xl", "destroy", name], capture_output=True, check=False)
            elif len(self._pending) == before:
                for nodeid in list(self._pending):
                    self._missing(nodeid, f"pytest ran nothing: {ended}; its output:\n{output}")
        self._send(event="end")

    def _pytest(self) -> tuple[str, str]:
        """Run what is pending in one process; returns how it ended and its last output."""
        SELECTION.write_text(json.dumps(self._pending), encoding="utf-8")
        files = list(dict.fromkeys(nodeid.partition("::")[0] for nodeid in self._pending))
        reports, reports_in = os.pipe()
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-o", "addopts="]
        command += ["-p", "no:cacheprovider", "--no-summary", "--continue-on-collection-errors"]
        command += [
            f"--domid={self._domid}",
            f"--victim-config=/lab/{self._order['guest']}/victim.cfg",
        ]
        command += [f"--xen={self._order['platform']}", f"--xen-select={SELECTION}"]
        command += [f"--xen-report=/dev/fd/{reports_in}", *self._order["options"], *files]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[reports_in],
            start_new_session=True,
        )
        os.close(reports_in)
        self._output.clear()
        copier = threading.Thread(target=self._copy, args=(process.stdout,), daemon=True)
        copier.start()
        timed_out = self._follow(process, reports)
        os.close(reports)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children a dead test left behind
        status = process.wait()
        copier.join(timeout=10)
        if timed_out:
            ended = f"no end after {self._order['timeout']} s"
        elif status < 0:
            ended = f"pytest died of {signal.Signals(-status).name}"
        else:
            ended = f"pytest exited with status {status}"
        return ended, "\n".join(self._output)

    def _follow(self, process: subprocess.Popen[str], reports: int) -> bool:
        """Pass on pytest's reports until it ends; true if it had to be killed."""
        rest = b""
        last = time.monotonic()
        while True:
            ended = process.poll() is not None
            if select.select([reports], [], [], 0 if ended else 0.5)[0]:
                data = os.read(reports, 65536)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
                    last = time.monotonic()
                if data:
                    continue
                time.sleep(0.05)  # closed: it is ending
            if ended:
                return False
            if time.monotonic() - last > self._order["timeout"]:
                # faulthandler answers with the stacks of all threads.
                process.send_signal(signal.SIGABRT)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                return True

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "collect":
                self._collect_errors[event["path"]] = event["text"]
                return
            case "missing":
                path = event["nodeid"].partition("::")[0]
                error = self._collect_errors.get(path, "no test of this name was collected")
                self._missing(event["nodeid"], error)
                return
            case "start":
                self._current = event["nodeid"]
                self._output.clear()  # what the tests before it printed does not explain its end
            case "finish":
                self._done(event["nodeid"])
        self._send(**event)

    def _copy(self, output: IO[str]) -> None:
        for line in output:
            sys.stdout.write(line)
            sys.stdout.flush()
            self._output.append(line.rstrip("\n"))

    def _missing(self, nodeid: str, text: str) -> None:
        self._send(event="crash", nodeid=nodeid, summary="not collected in Dom0", text=text)
        self._done(nodeid)

    def _done(self, nodeid: str) -> None:
        self._pending.remove(nodeid)
        self._current = ""

    def _send(self, **event: object) -> None:
        self._channel.write(json.dumps(event) + "\n")
        self._channel.flush()


if __name__ == "__main__":
    with open(os.environ["LAB_CHANNEL"], "w", encoding="utf-8") as device:
        Supervisor(sys.argv[1], json.loads(Path("lab.json").read_text()), device).run()
