"""libxendevicemodel: what C receives, what comes back, what is raised; and libxentoolcore."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from mmap import PROT_READ, PROT_WRITE
from unittest.mock import ANY

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding.devicemodel import MODIFIED, MODIFIED_BULK, DeviceModel
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.toolcore import RESTRICT, restrict_all
from xenmapcache.errors import XenCallError

# Each method, its C function after "xendevicemodel_", and what C is to receive.
CALLS: dict[str, tuple[Callable[[DeviceModel], object], tuple[object, ...]]] = {
    "create_ioreq_server": (lambda model: model.create_ioreq_server(DOMID, False), (DOMID, 0, ANY)),
    "destroy_ioreq_server": (lambda model: model.destroy_ioreq_server(DOMID, 1), (DOMID, 1)),
    "set_ioreq_server_state": (
        lambda model: model.set_ioreq_server_state(DOMID, 1, True),
        (DOMID, 1, 1),
    ),
    "get_ioreq_server_info": (
        lambda model: model.buffered_port(DOMID, 1),
        (DOMID, 1, 0, 0, ANY),
    ),
    "map_io_range_to_ioreq_server": (
        lambda model: model.map_io_range(DOMID, 1, True, 0xFEB0_0000, 1 << 40),
        (DOMID, 1, 1, 0xFEB0_0000, 1 << 40),
    ),
    "unmap_io_range_from_ioreq_server": (
        lambda model: model.unmap_io_range(DOMID, 1, False, 0x3F8, 0x3FF),
        (DOMID, 1, 0, 0x3F8, 0x3FF),
    ),
    "map_pcidev_to_ioreq_server": (
        lambda model: model.map_pcidev(DOMID, 1, 0x1234, 0xAB, 31, 7),
        (DOMID, 1, 0x1234, 0xAB, 31, 7),
    ),
    "unmap_pcidev_from_ioreq_server": (
        lambda model: model.unmap_pcidev(DOMID, 1, 0x1234, 0xAB, 31, 7),
        (DOMID, 1, 0x1234, 0xAB, 31, 7),
    ),
    "modified_memory_bulk": (
        lambda model: model.modified_memory(DOMID, 9, 2),
        (DOMID, 1, 2, 0, 9),
    ),
    "track_dirty_vram": (
        lambda model: model.track_dirty_vram(DOMID, 9, 2),
        (DOMID, 9, 2),
    ),
    "inject_msi": (
        lambda model: model.inject_msi(DOMID, 0xFEE0_1000, 0x4031),
        (DOMID, 0xFEE0_1000, 0x4031),
    ),
    "set_isa_irq_level": (lambda model: model.set_isa_irq_level(DOMID, 15, True), (DOMID, 15, 1)),
    "set_irq_level": (lambda model: model.set_irq_level(DOMID, 40, True), (DOMID, 40, 1)),
    "nr_vcpus": (lambda model: model.nr_vcpus(DOMID), (DOMID, ANY)),
    "set_pci_intx_level": (
        lambda model: model.set_pci_intx_level(DOMID, 0, 0, 5, 3, True),
        (DOMID, 0, 0, 5, 3, 1),
    ),
}


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    """Each function's name."""
    return f"xendevicemodel_{request.param}"


@pytest.fixture
def call(name: str) -> Callable[[DeviceModel], object]:
    """The method that calls it."""
    return CALLS[name.removeprefix("xendevicemodel_")][0]


@pytest.fixture
def server(model: DeviceModel) -> int:
    """An ioreq server with the number 1, as the arguments here have it."""
    assert model.create_ioreq_server(DOMID, False) == 0
    return model.create_ioreq_server(DOMID, True)


@pytest.mark.usefixtures("server")
def test_arguments(
    model: DeviceModel, fake: FakeXen, name: str, call: Callable[[DeviceModel], object]
) -> None:
    """Each method makes its call, once, with the arguments in the header's order."""
    before = len(fake.calls)
    call(model)
    (received,) = fake.calls[before:]
    assert received.name == name
    assert received.arguments[0] != 0
    assert received.arguments[1:] == CALLS[name.removeprefix("xendevicemodel_")][1]


@pytest.mark.usefixtures("server")
def test_failures(
    model: DeviceModel, fake: FakeXen, name: str, call: Callable[[DeviceModel], object]
) -> None:
    """A call that fails raises with its name, the domain and its errno, or EIO without one."""
    fake.plan(name, Behaviour.FAIL, errno.EBUSY)
    fake.plan(name, Behaviour.FAIL, 0, nth=2)
    for number in (errno.EBUSY, errno.EIO):
        with pytest.raises(XenCallError) as caught:
            call(model)
        assert (caught.value.call, caught.value.domid) == (name, DOMID)
        assert caught.value.errno == number


@pytest.mark.parametrize("buffered", [False, True])
def test_kinds_of_server(model: DeviceModel, fake: FakeXen, buffered: bool) -> None:
    """Buffered requests are asked for as LEGACY, else they are OFF."""
    model.create_ioreq_server(DOMID, buffered)
    assert fake.calls[-1].arguments[2] == int(buffered)


def test_life_of_a_server(model: DeviceModel, fake: FakeXen) -> None:
    """Numbers and ports come back, and a server is created, enabled, disabled and destroyed."""
    model.create_ioreq_server(DOMID, False)
    server = model.create_ioreq_server(DOMID, True)
    assert server == 1
    model.set_ioreq_server_state(DOMID, server, True)
    assert fake.servers == {0: False, 1: True}
    assert model.buffered_port(DOMID, server) == 128
    model.set_ioreq_server_state(DOMID, server, False)
    assert fake.servers == {0: False, 1: False}
    model.destroy_ioreq_server(DOMID, server)
    assert fake.servers == {0: False}


def test_levels_go_down(model: DeviceModel, fake: FakeXen) -> None:
    """False lowers a line."""
    model.set_isa_irq_level(DOMID, 4, False)
    assert fake.calls[-1].arguments[1:] == (DOMID, 4, 0)
    model.set_pci_intx_level(DOMID, 0, 0, 5, 0, False)
    assert fake.calls[-1].arguments[1:] == (DOMID, 0, 0, 5, 0, 0)


def test_modified_memory_of_an_old_library(make_fake: MakeFake, binding: str) -> None:
    """Where there is no bulk call the single one is made, with the frame and the count."""
    old = make_fake("OLD")
    with DeviceModel(binding=binding, library=old.library) as model:
        assert not model.supports(MODIFIED_BULK)
        model.modified_memory(DOMID, 9, 2)
        assert old.calls[-1] == (MODIFIED, (ANY, DOMID, 9, 2), ())
        old.plan(MODIFIED, Behaviour.FAIL, errno.EINVAL)
        with pytest.raises(XenCallError) as caught:
            model.modified_memory(DOMID, 9, 2)
    assert (caught.value.call, caught.value.errno) == (MODIFIED, errno.EINVAL)


def test_numbers_that_do_not_fit(model: DeviceModel, fake: FakeXen) -> None:
    """A number too large or too small for its C type is not cut off: it reaches no library."""
    before = fake.calls
    for wrong in (256, -1):
        with pytest.raises(OverflowError):
            model.map_pcidev(DOMID, 1, 0, wrong, 0, 0)
    with pytest.raises(OverflowError):
        model.destroy_ioreq_server(DOMID + 0x10000, 1)
    with pytest.raises(OverflowError):
        model.map_io_range(DOMID, 1, True, 0, 1 << 64)
    assert fake.calls == before


def test_pages_of_a_server(
    model: DeviceModel, memory: ForeignMemory, fake: FakeXen, server: int
) -> None:
    """What Xen writes into a server's pages is seen in the mapped resource, and back."""
    model.set_ioreq_server_state(DOMID, server, True)
    resource, address = memory.map_resource(DOMID, 0, server, 0, 2, PROT_READ | PROT_WRITE)
    view = peek(address, 2 * PAGE_SIZE)
    assert view[PAGE_SIZE + 24] == 65  # vp_eport, which Xen sets when it enables the server
    with fake.ioreq_page(server) as page, fake.ioreq_page(server, buffered=True) as buffered:
        page[:4], buffered[:4] = b"sync", b"buff"
        assert (bytes(view[PAGE_SIZE:][:4]), bytes(view[:4])) == (b"sync", b"buff")
        view[PAGE_SIZE + 31] = 8
        assert page[31] == 8
    view.release()
    memory.unmap_resource(resource)
    with pytest.raises(XenCallError, match="ENOENT"):
        memory.map_resource(DOMID, 0, 0, 0, 1, PROT_READ)  # that server has no buffered page


def peek(address: int, length: int) -> memoryview:
    """Return mapped memory; it is not to be used after it is unmapped."""
    # SAFETY: the caller has just mapped it.
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


# --- libxentoolcore -----------------------------------------------------------------


def test_restrict_all(fake: FakeXen, binding: str) -> None:
    """The domain that is left reaches C."""
    restrict_all(DOMID, binding=binding, library=fake.library)
    assert fake.calls == [(RESTRICT, (DOMID,), ())]


def test_restrict_all_that_fails(fake: FakeXen, binding: str) -> None:
    """A restriction that did not succeed is never ignored."""
    fake.plan(RESTRICT, Behaviour.FAIL, errno.ENOTTY)
    with pytest.raises(XenCallError) as caught:
        restrict_all(DOMID, binding=binding, library=fake.library)
    assert (caught.value.call, caught.value.domid, caught.value.errno) == (
        RESTRICT,
        DOMID,
        errno.ENOTTY,
    )
