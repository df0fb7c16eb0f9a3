"""Everything here is shown over both loaders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_xen import FakeXen, need
from tests.fake_xen.fixtures import MakeFake, make_fake
from xenmapcache.binding.control import Control
from xenmapcache.binding.devicemodel import DeviceModel
from xenmapcache.binding.eventchannel import EventChannels
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.granttable import GrantTable

__all__ = ["make_fake"]


@pytest.fixture(params=["cffi", "ctypes"])
def binding(request: pytest.FixtureRequest) -> str:
    """A loader's name."""
    name: str = request.param
    if name == "cffi":
        need("_cffi_backend")
    return name


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeXen:
    """The stand-in: 64 pages, gfn 5 a hole."""
    return make_fake(holes=[(5, 1)])


@pytest.fixture
def memory(fake: FakeXen, binding: str) -> Iterator[ForeignMemory]:
    """An open libxenforeignmemory; its functions were used properly."""
    with ForeignMemory(binding=binding, library=fake.library) as memory:
        yield memory
    assert fake.misuses == 0


@pytest.fixture
def control(fake: FakeXen, binding: str) -> Iterator[Control]:
    """An open libxenctrl; its functions were used properly."""
    with Control(binding=binding, library=fake.library) as control:
        yield control
    assert fake.misuses == 0


@pytest.fixture
def model(fake: FakeXen, binding: str) -> Iterator[DeviceModel]:
    """An open libxendevicemodel; its functions were used properly."""
    with DeviceModel(binding=binding, library=fake.library) as model:
        yield model
    assert fake.misuses == 0


@pytest.fixture
def channels(fake: FakeXen, binding: str) -> Iterator[EventChannels]:
    """An open libxenevtchn; its functions were used properly."""
    with EventChannels(binding=binding, library=fake.library) as channels:
        yield channels
    assert fake.misuses == 0


@pytest.fixture
def grants(fake: FakeXen, binding: str) -> Iterator[GrantTable]:
    """An open libxengnttab; its functions were used properly."""
    with GrantTable(binding=binding, library=fake.library) as grants:
        yield grants
    assert fake.misuses == 0
