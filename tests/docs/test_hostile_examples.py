"""A guest that means harm, against every example device: each request is answered."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.block_device import BlockDevice
from examples.framebuffer import Display
from tests.effort import examples
from tests.kit import Memory, ask
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import Request

PORT, VGA, ONES = 0x510, 0xA0000, 0xFFFFFFFF
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 3, 0x1000, VGA, PORT, 0xFFFFF, 1 << 52, (1 << 64) - 1, (1 << 63)]),
    st.integers(0, (1 << 64) - 1),
)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[MockDomain, IoreqServer]]:
    """A server with each example device and a plain one, served in a thread."""
    guest = MockHypervisor().create_domain(memory="1M", holes=[(VGA, 0x20000)], vcpus=2)
    guest.vcpu_timeout = 20.0
    with (
        tempfile.NamedTemporaryFile() as file,
        open_backend("mock", domain=guest) as backend,
        MapCache(backend, max_resident="512K", bucket_shift=16) as cache,
    ):
        file.truncate(1 << 20)
        server = IoreqServer(guest, cache, buffered=True)
        display = Display(cache, 0x10000, 8, 8, 64)
        server.claim_ports(0x600, 4, display)
        server.claim_mmio(VGA, 0x1000, Memory())
        server.claim_pci("00:05.0", Memory())
        with BlockDevice(server, cache, file.name), server, server.serving():
            yield guest, server
        display.close()


REQUESTS = st.builds(
    Request,
    st.just(0),
    st.one_of(st.sampled_from([0, 1, 2, 7, 8]), st.integers(0, 255)),
    st.booleans(),
    st.one_of(NUMBERS, st.integers(PORT - 4, PORT + 40), st.integers(VGA, VGA + 0x1000)),
    NUMBERS,
    st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(0, 0xFFFFFFFF)),
    st.one_of(st.integers(0, 4), st.integers(0, 0xFFFFFFFF)),
    st.booleans(),
    st.booleans(),
)


@settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(request=REQUESTS)
def test_every_request_is_answered(
    served: tuple[MockDomain, IoreqServer], request: Request
) -> None:
    """Whatever stands in the page; and the next, good request is answered as ever."""
    guest, server = served
    ask(guest, server, request)
    assert guest.port_in(0x600, vcpu=1) is not None
    assert guest.crashed == ""


@settings(
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(registers=st.lists(st.tuples(st.integers(0, 7), NUMBERS), max_size=12))
def test_every_register_takes_every_value(
    served: tuple[MockDomain, IoreqServer], registers: list[tuple[int, int]]
) -> None:
    """A driver that writes anything into a disk's registers, in any order."""
    guest, _ = served
    for register, value in registers:
        guest.port_out(PORT + 4 * register, value & ONES)
    assert guest.port_in(PORT) is not None
    assert guest.crashed == ""
