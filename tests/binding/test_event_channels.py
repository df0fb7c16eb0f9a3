"""libxenevtchn: what C receives, what comes back, what is raised."""

from __future__ import annotations

import errno
import select
from collections.abc import Callable

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from xenmapcache.binding.eventchannel import EventChannels
from xenmapcache.errors import ClosedError, XenCallError

GUEST = 77
CALLS: dict[str, tuple[Callable[[EventChannels], object], tuple[int, ...]]] = {
    "fd": (lambda channels: channels.fileno(), ()),
    "bind_interdomain": (lambda channels: channels.bind_interdomain(DOMID, 78), (DOMID, 78)),
    "unbind": (lambda channels: channels.unbind(1), (1,)),
    "notify": (lambda channels: channels.notify(1), (1,)),
    "unmask": (lambda channels: channels.unmask(1), (1,)),
    "pending": (lambda channels: channels.pending(), ()),
}


@pytest.fixture
def port(channels: EventChannels) -> int:
    """A local port, bound to the guest's; nothing is pending."""
    port = channels.bind_interdomain(DOMID, GUEST)
    assert take(channels) == port  # binding may have missed an event, so there is one
    return port


def ready(channels: EventChannels, wait: int = 0) -> bool:
    """Tell whether an event is pending."""
    poll = select.poll()
    poll.register(channels.fileno(), select.POLLIN)
    return bool(poll.poll(wait))


def take(channels: EventChannels) -> int:
    """Return the port of the event that is pending, and let it come again."""
    assert ready(channels)
    port = channels.pending()
    channels.unmask(port)
    return port


@pytest.mark.parametrize("name", CALLS)
def test_arguments_and_failures(
    channels: EventChannels, fake: FakeXen, port: int, name: str
) -> None:
    """Each method makes its call with its arguments, and raises when that fails."""
    method, arguments = CALLS[name]
    assert port == 1
    fake.send(GUEST)
    before = len(fake.calls)
    method(channels)
    (received,) = fake.calls[before:]
    assert received.name == f"xenevtchn_{name}"
    assert received.arguments[1:] == arguments
    fake.plan(received.name, Behaviour.FAIL, errno.EBUSY)
    with pytest.raises(XenCallError) as caught:
        method(channels)
    assert (caught.value.call, caught.value.errno) == (received.name, errno.EBUSY)
    assert caught.value.domid == (DOMID if name == "bind_interdomain" else None)


def test_events_come(channels: EventChannels, fake: FakeXen, port: int) -> None:
    """The descriptor is readable when the guest has sent an event, and pending tells the port."""
    assert not ready(channels)
    fake.send(GUEST)
    assert ready(channels)
    assert channels.pending() == port
    assert not ready(channels)


def test_no_event_comes_before_unmask(channels: EventChannels, fake: FakeXen, port: int) -> None:
    """After pending the port is masked: the next event waits, and is not lost."""
    fake.send(GUEST)
    assert channels.pending() == port
    fake.send(GUEST)
    assert not ready(channels)
    channels.unmask(port)
    assert ready(channels)
    assert channels.pending() == port


def test_notify_reaches_the_guest(channels: EventChannels, fake: FakeXen, port: int) -> None:
    """An event for a local port comes to the guest's at the other end."""
    other = channels.bind_interdomain(DOMID, GUEST + 1)
    assert other != port
    channels.notify(other)
    channels.notify(port)
    assert [fake.notified(), fake.notified(), fake.notified(0)] == [GUEST + 1, GUEST, 0]


def test_unbound_port(channels: EventChannels, port: int) -> None:
    """A port that was given up cannot be notified, nor given up again."""
    channels.unbind(port)
    for refused in (channels.notify, channels.unbind):
        with pytest.raises(XenCallError) as caught:
            refused(port)
        assert caught.value.errno == errno.ENOTCONN


def test_a_port_has_one_other_end(
    channels: EventChannels, fake: FakeXen, binding: str, port: int
) -> None:
    """A guest's port is refused to a second handle, until the first gives it up or is closed."""
    with EventChannels(binding=binding, library=fake.library) as others:
        with pytest.raises(XenCallError) as caught:
            others.bind_interdomain(DOMID, GUEST)
        assert (caught.value.errno, caught.value.domid) == (errno.EINVAL, DOMID)
        channels.close()
        bound = others.bind_interdomain(DOMID, GUEST)
        assert take(others) == bound


def test_closed(channels: EventChannels, fake: FakeXen) -> None:
    """After close no call reaches C, and its handle was closed once."""
    channels.close()
    channels.close()
    with pytest.raises(ClosedError, match="this libxenevtchn handle is closed"):
        channels.fileno()
    assert fake.count("xenevtchn_close") == 1
    assert fake.count("xenevtchn_fd") == 0
