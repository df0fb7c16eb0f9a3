"""Prometheus itself: its promtool reads our files and output, and its server scrapes two devices.

Both programs are in Debian's package prometheus, which `.ci/nightly tools` installs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from tests.images import tools
from xenmapcache import Lease, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.observe import metrics
from xenmapcache.observe.metrics import DATA

pytestmark = pytest.mark.slow

RULE_TESTS = Path(__file__).with_name("alerts_test.yml")
DEADLINE_S = 60
LISTENING = re.compile(r'msg="Listening on" address=(127\.0\.0\.1:\d+)')


def program(name: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name)
    if path is None:
        tools.missing(f"{name} is not installed (Debian: apt install prometheus)")
    return path


class Device:
    """A device of a mock guest that holds a lease for as long as a test wants; and its metrics."""

    def __init__(self, name: str) -> None:
        self.guest: MockDomain = MockHypervisor().create_domain(memory="4M")
        self.backend = open_backend("mock", domain=self.guest)
        self.cache = MapCache(self.backend)
        self.server = IoreqServer(self.guest, self.cache)
        self.server.claim_ports(0x300, 1).write(self.write)
        self.registry = CollectorRegistry()
        self.export = metrics.export(self.cache, self.server, self.registry, name=name)
        self.leases: list[Lease] = []

    def write(self, offset: int, size: int, value: int) -> None:
        """Begin a transfer, or end it."""
        if value:
            self.leases.append(self.cache.map_dma(0x1000, 0x1000, owner="disk0"))
        else:
            self.leases.pop().release()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve the guest and Prometheus; yields the address of the metrics."""
        with self.backend, self.cache, self.server, self.server.serving():
            http, thread = start_http_server(0, addr="127.0.0.1", registry=self.registry)
            try:
                yield f"127.0.0.1:{http.server_port}"
            finally:
                http.shutdown()
                http.server_close()
                thread.join()


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """Run Prometheus with our rules; yields the address of its API."""
    shutil.copy(DATA / "alerts.yml", folder)
    config = {
        "global": {
            "scrape_interval": "200ms",
            "scrape_timeout": "200ms",
            "evaluation_interval": "200ms",
        },
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "xen", "static_configs": [{"targets": targets}]}],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [
        program("prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        seen: list[str] = []
        reader = None
        try:
            for line in process.stderr:
                seen.append(line)
                if found := LISTENING.search(line):
                    break
            else:
                pytest.fail(f"Prometheus ended: {''.join(seen)}")
            # Otherwise it would wait until its log is read.
            reader = threading.Thread(target=process.stderr.read)
            reader.start()
            yield found[1]
        finally:
            process.terminate()
            if reader is not None:
                reader.join()


def ask(address: str, what: str, **query: str) -> Any:  # noqa: ANN401 - JSON
    """Return the data of an answer; None as long as Prometheus starts."""
    url = f"http://{address}/api/v1/{what}?{urllib.parse.urlencode(query)}"
    with suppress(OSError), urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return json.load(answer)["data"]
    return None


def firing(address: str) -> set[tuple[str, str]]:
    """Return the name of each alert that fires, and its cache."""
    data = ask(address, "alerts") or {"alerts": []}
    return {
        (alert["labels"]["alertname"], alert["labels"]["cache"])
        for alert in data["alerts"]
        if alert["state"] == "firing"
    }


def wait_until(check: Callable[[], object]) -> None:
    """Wait for something that Prometheus sees after its next scrape."""
    deadline = monotonic() + DEADLINE_S
    pause = threading.Event()
    while not check():
        assert monotonic() < deadline
        pause.wait(0.05)


def test_promtool_accepts_the_rules() -> None:
    """It finds no error in them."""
    done = tools.run(program("promtool"), "check", "rules", DATA / "alerts.yml")
    assert "SUCCESS: 6 rules found" in done


def test_promtool_parses_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """As expressions of rules, with values in the place of Grafana's variables."""
    dashboard = json.loads((DATA / "dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {
            "record": f"query:{number}",
            "expr": re.sub(r"\$__\w+", "5m", query)
            .replace("$cache", ".*")
            .replace("$instance", ".*"),
        }
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "rules.json"  # what is JSON is YAML, too
    for wrong, expected in (("", f"SUCCESS: {len(queries)} rules found"), (")", "unexpected")):
        rules[-1]["expr"] += wrong
        path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
        done = subprocess.run(
            [program("promtool"), "check", "rules", path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout + done.stderr
        assert (done.returncode == 0) == (not wrong)


def test_the_rules_fire_and_clear_in_time(tmp_path: Path) -> None:
    """Promtool runs the tests of rules, over hours of made-up samples."""
    shutil.copy(DATA / "alerts.yml", tmp_path)
    shutil.copy(RULE_TESTS, tmp_path)
    assert "SUCCESS" in tools.run(program("promtool"), "test", "rules", tmp_path / RULE_TESTS.name)


def test_promtool_accepts_the_output() -> None:
    """Names, types and help of all metrics follow the rules of Prometheus."""
    device = Device("web")
    with device.running():
        device.guest.port_out(0x300, 1, 1)
        output = generate_latest(device.registry).decode()
        device.guest.port_out(0x300, 0, 1)
    assert tools.run(program("promtool"), "check", "metrics", stdin=output) == ""


def test_prometheus_scrapes_two_devices(tmp_path: Path) -> None:
    """An alert of the one that holds a stale lease fires, and clears after the release."""
    program("prometheus")
    web, mail = Device("web"), Device("mail")
    stale = ("XenmapcacheDmaLeaseStale", "web")
    with (
        web.running() as first,
        mail.running() as second,
        prometheus(tmp_path, [first, second]) as address,
    ):

        def held() -> dict[str, str]:
            data = ask(address, "query", query="sum by (cache) (xenmapcache_leases)")
            return {each["metric"]["cache"]: each["value"][1] for each in data["result"]}

        def mapped() -> set[str]:
            data = ask(address, "query", query="xenmapcache_resident_bytes") or {"result": []}
            return {each["metric"]["cache"] for each in data["result"]}

        wait_until(lambda: mapped() == {"web", "mail"})
        for device in (web, mail):
            device.guest.port_out(0x300, 1, 1)
        wait_until(lambda: held() == {"web": "1", "mail": "1"})
        assert firing(address) == set()
        web.guest.balloon_out(0x20_0000, 0x1000)
        wait_until(lambda: stale in firing(address))
        assert firing(address) == {stale}
        for device in (web, mail):
            device.guest.port_out(0x300, 0, 1)
        wait_until(lambda: stale not in firing(address))
