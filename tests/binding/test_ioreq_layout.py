"""Our layout of the shared pages is that of Xen's header, bit by bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fake_xen import compiler, missing
from xenmapcache import ioreq
from xenmapcache.ioreq import (
    SLOT_SIZE,
    Request,
    RequestKind,
    State,
    decode,
    encode,
    next_buffered,
    parse_bdf,
    port_of,
    put_buffered,
    set_state,
    state_of,
    take_buffered,
)

# The second slot of the page of synchronous requests; then the page of buffered ones.
PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <xen/xen.h>
#include <xen/hvm/ioreq.h>
int main(void)
{
    static union { struct ioreq slots[128]; char bytes[4096]; } page;
    struct ioreq *slot = &page.slots[1];
    slot->addr = 0x1122334455667788;
    slot->data = 0x99aabbccddeeff00;
    slot->count = 7;
    slot->size = 4;
    slot->vp_eport = 12345;
    slot->state = STATE_IOREQ_READY;
    slot->data_is_ptr = 1;
    slot->dir = IOREQ_READ;
    slot->df = 1;
    slot->type = IOREQ_TYPE_COPY;
    static union { struct buffered_iopage ring; char bytes[4096]; } buffered;
    buffered.ring.read_pointer = IOREQ_BUFFER_SLOT_NUM - 1;
    buffered.ring.write_pointer = IOREQ_BUFFER_SLOT_NUM + 2;
    struct buf_ioreq *last = &buffered.ring.buf_ioreq[IOREQ_BUFFER_SLOT_NUM - 1];
    last->type = IOREQ_TYPE_COPY;
    last->dir = IOREQ_WRITE;
    last->size = 1;
    last->addr = 0xfedcb;
    last->data = 0x1234;
    for (int half = 0; half < 2; half++) {
        struct buf_ioreq *wide = &buffered.ring.buf_ioreq[half];
        wide->type = IOREQ_TYPE_COPY;
        wide->size = 3;
        wide->addr = 0xa0000;
        wide->data = half ? 0x55667788 : 0x11223344;
    }
    _Static_assert(sizeof(struct ioreq) == 32, "slot");
    _Static_assert(STATE_IOREQ_NONE == 0 && STATE_IOREQ_INPROCESS == 2, "states");
    _Static_assert(STATE_IORESP_READY == 3, "states");
    _Static_assert(IOREQ_TYPE_PIO == 0 && IOREQ_TYPE_PCI_CONFIG == 2, "types");
    _Static_assert(IOREQ_TYPE_TIMEOFFSET == 7 && IOREQ_TYPE_INVALIDATE == 8, "types");
    fwrite(page.bytes, 1, 4096, stdout);
    fwrite(buffered.bytes, 1, 4096, stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[memoryview, memoryview]:
    """Both pages, filled by a program that was compiled against the real header."""
    if not Path("/usr/include/xen/hvm/ioreq.h").exists():
        missing("xen/hvm/ioreq.h is not installed (Debian: apt install libxen-dev)")
    target = tmp_path_factory.mktemp("ioreq") / "fill"
    command = [compiler(), "-Wall", "-Werror", "-o", str(target), "-x", "c", "-"]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    both = bytearray(subprocess.run([target], capture_output=True, check=True).stdout)
    return memoryview(both)[:4096], memoryview(both)[4096:]


SEEN = Request(1, RequestKind.MMIO, True, 0x1122334455667788, 0x99AABBCCDDEEFF00, 4, 7, True, True)


def test_a_request_is_read(pages: tuple[memoryview, memoryview]) -> None:
    """Each field, and each bit beside the state."""
    page, _ = pages
    assert decode(page, 1) == SEEN
    assert (port_of(page, 1), state_of(page, 1)) == (12345, State.READY)
    assert (port_of(page, 0), state_of(page, 2)) == (0, State.NONE)


def test_a_request_is_written(pages: tuple[memoryview, memoryview]) -> None:
    """What the mock writes is byte for byte what Xen writes."""
    page, _ = pages
    ours = memoryview(bytearray(4096))
    ours[SLOT_SIZE + 24 : SLOT_SIZE + 28] = (12345).to_bytes(4, "little")
    encode(ours, 1, SEEN)
    set_state(ours, 1, State.READY)
    assert ours == page


def test_buffered_requests_are_read(pages: tuple[memoryview, memoryview]) -> None:
    """The last slot, and a wide one in two slots after the ring has come round."""
    _, pristine = pages
    ring = memoryview(bytearray(pristine))
    first = next_buffered(ring)
    assert first == Request(None, RequestKind.MMIO, False, 0xFEDCB, 0x1234, 2)
    take_buffered(ring, first)
    second = next_buffered(ring)
    assert second == Request(None, RequestKind.MMIO, False, 0xA0000, 0x5566778811223344, 8)
    take_buffered(ring, second)
    assert next_buffered(ring) is None


def test_buffered_requests_are_written(pages: tuple[memoryview, memoryview]) -> None:
    """As Xen writes them."""
    _, pristine = pages
    ring = memoryview(bytearray(4096))
    ring[0:4] = ring[4:8] = (510).to_bytes(4, "little")
    assert put_buffered(ring, Request(None, RequestKind.MMIO, False, 0xFEDCB, 0x1234, 2))
    wide = Request(None, RequestKind.MMIO, False, 0xA0000, 0x5566778811223344, 8)
    assert put_buffered(ring, wide)
    assert ring == pristine


def test_the_ring_has_an_end() -> None:
    """A full ring, a far address and data by pointer are not taken."""
    ring = memoryview(bytearray(4096))
    small = Request(None, RequestKind.MMIO, False, 0xA0000, 1, 1)
    assert all(put_buffered(ring, small) for _ in range(510))
    assert not put_buffered(ring, small._replace(size=8))
    assert put_buffered(ring, small)
    assert not put_buffered(ring, small)
    empty = memoryview(bytearray(4096))
    assert not put_buffered(empty, small._replace(address=1 << 20))
    assert not put_buffered(empty, small._replace(is_pointer=True))
    assert not put_buffered(empty, small._replace(items=2))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0000:00:05.0", (0, 0, 5, 0)),
        ("00:1f.7", (0, 0, 31, 7)),
        ("ffff:ff:1F.7", (0xFFFF, 0xFF, 31, 7)),
    ],
)
def test_pci_functions(text: str, parts: tuple[int, ...]) -> None:
    """With and without a segment."""
    assert parse_bdf(text) == parts


def test_data_come_before_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vCPU that sees its answer's state finds its data there."""
    page, seen = memoryview(bytearray(4096)), []
    real = ioreq.set_state

    def noted(page: memoryview, vcpu: int, state: State) -> None:
        seen.append(ioreq.decode(page, vcpu).data)
        real(page, vcpu, state)

    monkeypatch.setattr(ioreq, "set_state", noted)
    ioreq.answer(page, 3, 0x1234)
    assert (seen, state_of(page, 3)) == ([0x1234], State.RESPONSE_READY)


def test_a_long_write_over_the_end_of_the_pointers() -> None:
    """The second half of 8 bytes is in slot 0 where the pointer's 32 bits end, as Xen has it."""
    ring = memoryview(bytearray(4096))
    last = 0xFFFFFFFF
    ioreq.RING_POINTERS.pack_into(ring, 0, last, 1)
    head = RequestKind.MMIO | 3 << 10 | 0xA0000 << 12 & 0xFFFFFFFF
    place = ioreq.RING_START + last % ioreq.RING_SLOTS * ioreq.RING_SLOT_SIZE
    ioreq.RING_SLOT.pack_into(ring, place, head, 0x55667788)
    ioreq.RING_SLOT.pack_into(ring, ioreq.RING_START, head, 0x11223344)
    request = ioreq.next_buffered(ring)
    assert request is not None
    assert (request.size, request.data) == (8, 0x1122334455667788)
    ioreq.take_buffered(ring, request)
    assert ioreq.next_buffered(ring) is None


def test_the_mocks_pointers_end_where_xens_do() -> None:
    """What is put over the end of their 32 bits is what is taken, and the ring gets full."""
    ring = memoryview(bytearray(4096))
    ioreq.RING_POINTERS.pack_into(ring, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    request = Request(None, RequestKind.MMIO, False, 0xA0000, 0x1122334455667788, 8)
    for _ in range(ioreq.RING_SLOTS // 2):
        assert put_buffered(ring, request)
    assert not put_buffered(ring, request)
    assert next_buffered(ring) == request
