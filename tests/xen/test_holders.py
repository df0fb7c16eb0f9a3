"""``xenmapcache holders`` in Dom0: a process that maps a live guest is listed."""

from __future__ import annotations

import json
import os

import pytest

from tests.xen.lab.platform import Platform
from xenmapcache import MapCache, open_backend
from xenmapcache.cli import main

pytestmark = pytest.mark.xen


def test_a_process_that_maps_the_guest_is_listed(
    live_domid: int, machine: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process, with at least the bucket that it has mapped and the node that it has open."""
    with open_backend("xen", domid=live_domid) as live, MapCache(live) as cache:
        address, _ = next(cache.present(*machine.memory))
        cache.read(address, 8)
        assert main(["holders", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        (own,) = [each for each in found["processes"] if each["pid"] == os.getpid()]
        (hold,) = [each for each in own["holds"] if each["device"] == "privcmd"]
        assert hold["mappings"] >= 1
        assert hold["bytes"] >= cache.stats().resident_bytes > 0
        assert hold["descriptors"] >= 1
        assert live_domid not in [each["domid"] for each in found["dying"]]
