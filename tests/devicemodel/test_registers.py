"""Registers by offset: which accesses are allowed, and what the hooks see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit import wait_for_the_log
from xenmapcache import MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.dispatch import BadValueError, GuestError
from xenmapcache.devicemodel.registers import RegisterBank

PORT = 0x600


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def bank(calls: list[tuple[str, int]]) -> RegisterBank:
    bank = RegisterBank("timer", 16)
    bank.add("control", 0, 4, mask=0xFF0F, write=lambda value: calls.append(("control", value)))
    bank.add("count", 4, 2, value=0x1234)
    bank.add("limit", 6, 2, write=lambda value: calls.append(("limit", value)))
    bank.add("clock", 8, 8, read=lambda: calls.append(("clock", 0)) or 0x1122334455667788)  # type: ignore[func-returns-value] # None, and so the number
    return bank


def test_an_access_to_a_part_has_the_whole_register(
    bank: RegisterBank, calls: list[tuple[str, int]]
) -> None:
    """One byte is read of the whole value, and its write gives the hook the whole value."""
    bank.write(0, 4, 0xFFFFFFFF)
    bank.write(1, 1, 0x21)
    assert calls == [("control", 0xFF0F), ("control", 0x210F)]
    assert [bank.read(offset, 1) for offset in range(4)] == [0x0F, 0x21, 0, 0]
    assert bank.read(10, 2) == 0x5566


def test_an_access_to_several_registers_reaches_each(
    bank: RegisterBank, calls: list[tuple[str, int]]
) -> None:
    """Eight bytes are divided between three registers; the lowest is written first."""
    bank.write(0, 8, 0xABCD_5555_0000_0001)
    assert calls == [("control", 1), ("limit", 0xABCD)]
    assert bank.read(0, 8) == 0xABCD_1234_0000_0001


def test_only_writable_bits_change(bank: RegisterBank) -> None:
    """A register without hook and mask is read-only; the device itself stores what it likes."""
    bank.write(4, 2, 0xFFFF)
    assert bank.read(4, 2) == 0x1234
    register = next(each for each in bank if each.name == "count")
    register.value = 7
    assert bank.read(4, 2) == 7


def test_reset_calls_no_hook(bank: RegisterBank, calls: list[tuple[str, int]]) -> None:
    """Each register has its initial value again."""
    bank.write(0, 4, 1)
    next(each for each in bank if each.name == "count").value = 7
    bank.reset()
    assert (bank.read(0, 4), bank.read(4, 2), calls) == (0, 0x1234, [("control", 1)])


def test_values_are_saved_and_restored(bank: RegisterBank, calls: list[tuple[str, int]]) -> None:
    """Of what was saved, only the bits count that the guest can change; no hook is called."""
    bank.write(0, 4, 0x8001)
    next(each for each in bank if each.name == "count").value = 7 | 1 << 99
    saved = bank.save()
    assert saved == bytes.fromhex("01800000 0700 0000 0000000000000000")
    bank.reset()
    bank.restore(saved)
    assert (bank.read(0, 4), bank.read(4, 2), len(calls)) == (0x8001, 0x1234, 1)
    with pytest.raises(ValueError, match="timer: state of 15 bytes must have 16"):
        bank.restore(saved[:15])


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 2, "timer: size 2 at offset 0x0 must be 1 or 4"),
        (2, 4, "timer: 4 bytes at offset 0x2 must be aligned"),
        (4, 4, "timer: no register has the 4 bytes at 0x4"),
        (8, 1, "timer: no register has the 1 bytes at 0x8"),
        (1 << 40, 1, "timer: no register has the 1 bytes at 0x10000000000"),
    ],
)
def test_an_access_that_is_not_allowed_changes_nothing(
    offset: int, size: int, message: str
) -> None:
    """It is the guest's mistake, named with what is allowed, and no hook is called."""
    written: list[int] = []
    bank = RegisterBank("timer", 16, sizes=(1, 4))
    bank.add("control", 0, 4, write=written.append)
    bank.add("half", 4, 2, write=written.append)
    for access in (lambda: bank.read(offset, size), lambda: bank.write(offset, size, 1)):
        with pytest.raises(GuestError, match=message):
            access()
    assert written == []


def test_gaps_and_unaligned_accesses_can_be_allowed() -> None:
    """Bytes without a register read as 0, as in a PCI configuration space."""
    bank = RegisterBank("space", 8, unaligned=True, gaps=True)
    bank.add("two", 2, 2, mask=0xFFFF, value=0x2211)
    bank.write(1, 4, 0xFFFFFFFF)
    assert (bank.read(0, 8), bank.read(3, 2), bank.read(7, 4)) == (0xFFFF0000, 0xFF, 0)
    assert RegisterBank("empty", 4, gaps=True).read(0, 4) == 0


@pytest.mark.parametrize("value", [-1, 0x100, None])
def test_a_read_hook_returns_what_fits(value: object) -> None:
    """Another result is an error that names the register."""
    bank = RegisterBank("timer", 4)
    bank.add("count", 0, 1, read=lambda: value)  # type: ignore[arg-type, return-value] # on purpose
    with pytest.raises(BadValueError, match="timer: register count: "):
        bank.read(0, 1)


def test_what_a_hook_raises_names_its_register() -> None:
    """The exception is the hook's, with a note."""
    bank = RegisterBank("timer", 8)
    bank.add("divisor", 4, 4, read=lambda: 1 // 0, write=lambda value: 1 // 0)
    for access in (lambda: bank.read(4, 4), lambda: bank.write(4, 4, 5)):
        with pytest.raises(ZeroDivisionError) as caught:
            access()
        assert caught.value.__notes__ == ["in register divisor at offset 0x4 of timer"]


def test_the_log_names_bank_and_register(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong access has one line; a hook's bug has a traceback that names the register."""
    bank = RegisterBank("timer", 8, sizes=(4,))
    bank.add("divisor", 4, 4, read=lambda: 1 // 0)
    live.claim_ports(PORT, bank.length, bank)
    assert guest.port_in(PORT + 4, 2) == 0xFFFF
    guest.port_out(PORT, 5)
    wait_for_the_log(live)
    assert "Traceback" not in caplog.text
    assert "failed: timer: size 2 at offset 0x4 must be 4" in caplog.text
    assert guest.port_in(PORT + 4) == 0xFFFFFFFF
    wait_for_the_log(live)
    assert "in register divisor at offset 0x4 of timer" in caplog.text
    assert live.failures == 3


def test_a_bank_shows_its_values(bank: RegisterBank) -> None:
    """By name, in the order of the offsets."""
    assert repr(bank) == "<RegisterBank timer: control=0x0, count=0x1234, limit=0x0, clock=0x0>"
    assert [each.offset for each in bank] == [0, 4, 6, 8]


@pytest.mark.parametrize(
    ("name", "offset", "size", "options", "message"),
    [
        ("x", 0, 0, {}, r"register x at 0x0\.\.0x0 must be within 0\.\.0x10"),
        ("x", -1, 1, {}, r"register x at -0x1\.\.0x0 must be within"),
        ("x", 15, 2, {}, r"register x at 0xf\.\.0x11 must be within"),
        ("x", 0, 1, {"value": 256}, "register x: value 0x100 and mask 0x0 must fit 1 bytes"),
        ("x", 0, 1, {"mask": -1}, "register x: value 0x0 and mask -0x1 must fit 1 bytes"),
        ("x", 3, 2, {}, "register x overlaps register first"),
        ("x", 7, 2, {}, "register x overlaps register last"),
    ],
)
def test_a_register_that_cannot_be(
    name: str, offset: int, size: int, options: dict[str, int], message: str
) -> None:
    """The author of a device is told at once."""
    bank = RegisterBank("timer", 16)
    bank.add("first", 0, 4)
    bank.add("last", 8, 8)
    with pytest.raises(ValueError, match=f"timer: {message}"):
        bank.add(name, offset, size, **options)  # type: ignore[arg-type] # by name
    assert len([*bank]) == 2


def test_a_bank_that_cannot_be() -> None:
    """Its length and its sizes are checked."""
    with pytest.raises(ValueError, match="timer: length must be at least 1 byte, not 0"):
        RegisterBank("timer", 0)
    for sizes in ((), (3,), (4, 16)):
        with pytest.raises(ValueError, match="timer: sizes .* must be some of"):
            RegisterBank("timer", 4, sizes=sizes)


SIZES = st.sampled_from((1, 2, 4, 8))


@given(
    st.lists(st.tuples(st.integers(0, 15), SIZES, st.integers(0, (1 << 64) - 1)), max_size=20),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, (1 << 40) - 1)), max_size=6),
)
def test_a_bank_is_memory_with_a_mask(
    writes: list[tuple[int, int, int]], layout: list[tuple[int, int]]
) -> None:
    """However registers divide the bytes, an access has the bytes and the writable bits."""
    bank = RegisterBank("any", 16, unaligned=True, gaps=True)
    mask = offset = 0
    for size, bits in layout:
        if offset + size > 16:
            break
        bits &= (1 << 8 * size) - 1
        bank.add(f"at{offset}", offset, size, mask=bits)
        mask |= bits << 8 * offset
        offset += size + (bits & 1)
    memory = 0
    for place, size, value in writes:
        ones = (1 << 8 * size) - 1 << 8 * place
        memory = memory & ~(ones & mask) | value << 8 * place & ones & mask
        bank.write(place, size, value & (1 << 8 * size) - 1)
        assert bank.read(place, size) == memory >> 8 * place & (1 << 8 * size) - 1
