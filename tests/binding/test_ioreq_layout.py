"""Our layout of the shared pages is that of Xen's header, bit by bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fake_xen import compiler, missing
from xenmapcache import ioreq
from xenmapcache.ioreq import (
    SLOT_SIZE,
    TRANSITIONS,
    BufferedRing,
    ProtocolError,
    Request,
    RequestKind,
    RequestSlot,
    State,
    bdf_number,
    bdf_text,
    parse_bdf,
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
    """Each field, and each bit next to the state."""
    page, _ = pages
    assert RequestSlot(page, 1).request() == SEEN
    assert (RequestSlot(page, 1).port, RequestSlot(page, 1).state) == (12345, State.READY)
    assert (RequestSlot(page, 0).port, RequestSlot(page, 2).state) == (0, State.NONE)


def test_a_request_is_written(pages: tuple[memoryview, memoryview]) -> None:
    """What the mock writes is byte for byte what Xen writes."""
    page, _ = pages
    ours = memoryview(bytearray(4096))
    ours[SLOT_SIZE + 24 : SLOT_SIZE + 28] = (12345).to_bytes(4, "little")
    RequestSlot(ours, 1).send(SEEN)
    assert ours == page


def test_buffered_requests_are_read(pages: tuple[memoryview, memoryview]) -> None:
    """The last slot, and a wide one in two slots after the ring has come round."""
    _, pristine = pages
    ring = memoryview(bytearray(pristine))
    first = BufferedRing(ring).peek()
    assert first == Request(None, RequestKind.MMIO, False, 0xFEDCB, 0x1234, 2)
    BufferedRing(ring).consume(first)
    second = BufferedRing(ring).peek()
    assert second == Request(None, RequestKind.MMIO, False, 0xA0000, 0x5566778811223344, 8)
    BufferedRing(ring).consume(second)
    assert BufferedRing(ring).peek() is None


def test_buffered_requests_are_written(pages: tuple[memoryview, memoryview]) -> None:
    """As Xen writes them."""
    _, pristine = pages
    ring = memoryview(bytearray(4096))
    ring[0:4] = ring[4:8] = (510).to_bytes(4, "little")
    assert BufferedRing(ring).append(Request(None, RequestKind.MMIO, False, 0xFEDCB, 0x1234, 2))
    wide = Request(None, RequestKind.MMIO, False, 0xA0000, 0x5566778811223344, 8)
    assert BufferedRing(ring).append(wide)
    assert ring == pristine


def test_the_ring_has_an_end() -> None:
    """A full ring, a far address and data by pointer are not taken."""
    ring = memoryview(bytearray(4096))
    small = Request(None, RequestKind.MMIO, False, 0xA0000, 1, 1)
    assert all(BufferedRing(ring).append(small) for _ in range(510))
    assert not BufferedRing(ring).append(small._replace(size=8))
    assert BufferedRing(ring).append(small)
    assert not BufferedRing(ring).append(small)
    empty = memoryview(bytearray(4096))
    assert not BufferedRing(empty).append(small._replace(address=1 << 20))
    assert not BufferedRing(empty).append(small._replace(data_is_ptr=True))
    assert not BufferedRing(empty).append(small._replace(count=2))


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
    slot, seen = RequestSlot(memoryview(bytearray(4096)), 3), []
    slot.send(SEEN)
    slot.begin()
    move = RequestSlot._move

    def noted(self: RequestSlot, step: str) -> None:
        seen.append((step, self.request().data))
        move(self, step)

    monkeypatch.setattr(RequestSlot, "_move", noted)
    slot.answer(0x1234)
    assert (seen, slot.state) == ([("answer", 0x1234)], State.RESPONSE_READY)


@pytest.mark.parametrize("step", TRANSITIONS)
@pytest.mark.parametrize("state", range(16))
def test_a_slot_moves_only_as_the_table_says(step: str, state: int) -> None:
    """Each step from each state: the next state, or ProtocolError and no byte changed."""
    page = memoryview(bytearray(4096))
    slot = RequestSlot(page, 1)
    page[SLOT_SIZE + 30] = 0x60 | state  # flags that a step must not change
    before = bytes(page)
    steps = {
        "send": lambda: slot.send(SEEN),
        "begin": slot.begin,
        "answer": lambda: slot.answer(5),
        "take": slot.take,
    }
    if TRANSITIONS[step][0] == state:
        steps[step]()
        assert slot.state == TRANSITIONS[step][1]
        assert page[SLOT_SIZE + 30] & 0xF0 == (0x70 if step == "send" else 0x60)
    else:
        with pytest.raises(ProtocolError, match=f"vCPU 1: {step} needs state"):
            steps[step]()
        assert bytes(page) == before
    assert repr(slot) == f"<slot of vCPU 1, state {slot.state}>"


def test_a_request_goes_round() -> None:
    """Xen sends, the device model begins and answers, Xen takes: then it begins again."""
    slot = RequestSlot(memoryview(bytearray(4096)), 2)
    for data in (5, 0xFFFF_FFFF_FFFF_FFFF):
        slot.send(SEEN)
        slot.begin()
        slot.answer(data)
        assert slot.take() == data
        assert slot.state == State.NONE


def test_half_a_quad_word_is_refused() -> None:
    """The ring ends after the first of two entries: nothing is made up for the second."""
    page = memoryview(bytearray(4096))
    ring = BufferedRing(page)
    assert ring.append(Request(None, RequestKind.MMIO, False, 0xA0000, 1, 8))
    ioreq.RING_POINTERS.pack_into(page, 0, 0, 1)
    with pytest.raises(ProtocolError, match="half of a quad-word"):
        ring.peek()
    ring.discard()
    assert ring.peek() is None


@pytest.mark.parametrize("entries", [512, 513, 0x80000000, 0xFFFFFFFF])
def test_pointers_further_apart_than_the_ring_are_refused(entries: int) -> None:
    """The same entries are never carried out twice."""
    page = memoryview(bytearray(4096))
    ioreq.RING_POINTERS.pack_into(page, 0, 7, 7 + entries & 0xFFFFFFFF)
    ring = BufferedRing(page)
    with pytest.raises(ProtocolError, match=f"{entries} entries apart"):
        ring.peek()
    ring.discard()
    assert (ring.read_pointer, ring.peek()) == (7 + entries & 0xFFFFFFFF, None)


def test_pci_functions_as_text() -> None:
    """What is parsed is shown again."""
    for text in ("0000:00:05.0", "ffff:ff:1f.7"):
        assert bdf_text(bdf_number(text)) == text


def test_a_long_write_over_the_end_of_the_pointers() -> None:
    """The second half of 8 bytes is in slot 0 where the pointer's 32 bits end, as Xen has it."""
    ring = memoryview(bytearray(4096))
    last = 0xFFFFFFFF
    ioreq.RING_POINTERS.pack_into(ring, 0, last, 1)
    head = RequestKind.MMIO | 3 << 10 | 0xA0000 << 12 & 0xFFFFFFFF
    place = ioreq.RING_START + last % ioreq.RING_SLOTS * ioreq.RING_SLOT_SIZE
    ioreq.RING_SLOT.pack_into(ring, place, head, 0x55667788)
    ioreq.RING_SLOT.pack_into(ring, ioreq.RING_START, head, 0x11223344)
    request = BufferedRing(ring).peek()
    assert request is not None
    assert (request.size, request.data) == (8, 0x1122334455667788)
    BufferedRing(ring).consume(request)
    assert BufferedRing(ring).peek() is None


def test_the_mocks_pointers_end_where_xens_do() -> None:
    """What is put over the end of their 32 bits is what is taken, and the ring gets full."""
    ring = memoryview(bytearray(4096))
    ioreq.RING_POINTERS.pack_into(ring, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    request = Request(None, RequestKind.MMIO, False, 0xA0000, 0x1122334455667788, 8)
    for _ in range(ioreq.RING_SLOTS // 2):
        assert BufferedRing(ring).append(request)
    assert not BufferedRing(ring).append(request)
    assert BufferedRing(ring).peek() == request
