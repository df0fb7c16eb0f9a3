"""RegisterBank: a device's registers, with names, sizes, writable bits and hooks."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

from ..address import as_int
from .dispatch import BadValueError, GuestError, checked

_ACCESS_SIZES = (1, 2, 4, 8)
_offset = attrgetter("offset")


class Register:
    """A register of a :class:`RegisterBank`; made by :meth:`RegisterBank.add`.

    Attributes:
        name: for logs.
        offset: of its first byte in the bank.
        size: in bytes.
        value: what it holds, little-endian in the guest's view. The device may store another
            value at any time.
        initial: its value after a reset.
        mask: the bits that the guest can change.
    """

    __slots__ = ("initial", "mask", "name", "offset", "read", "size", "value", "write")

    def __init__(
        self,
        name: str,
        offset: int,
        size: int,
        value: int,
        mask: int,
        read: Callable[[], int] | None,
        write: Callable[[int], object] | None,
    ) -> None:
        self.name = name
        self.offset = offset
        self.size = size
        self.value = self.initial = value
        self.mask = mask
        self.read = read
        self.write = write

    def __repr__(self) -> str:
        return f"{self.name}={self.value:#x}"

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.size


class _Piece(NamedTuple):
    """What an access has of one register, in bits: from where in each, and which."""

    register: Register
    skip: int
    shift: int
    ones: int


class RegisterBank:
    """Registers by offset. It is a device: give it to a claim or to a BAR.

    The size of an access and the size of a register are separate, as QEMU's ``valid`` and ``impl``
    are. ``sizes`` are the sizes of access that the guest may use. A hook always works with a
    complete register: an access to several registers calls the hooks of each one, lowest first,
    and an access to a part of a register calls its hooks with the complete value.

        timer = RegisterBank("timer", 16, sizes=(4, 8))
        control = timer.add("control", 0, 4, mask=0x3, write=start)
        timer.add("count", 8, 8, read=clock.count)
        server.claim_mmio(0xFE000000, timer.length, timer)

    An access that is not allowed is the guest's mistake: the guest reads all ones, its write is
    dropped, no hook is called, and the log has one line. The number of these lines is limited for
    each region. If a hook raises, the exception has a note that names the register.

    Args:
        name: the device's name, for logs.
        length: in bytes.
        sizes: the sizes of access that are allowed, in bytes.
        unaligned: whether an access may begin at an offset that is not a multiple of its size.
        gaps: whether bytes without a register read as 0 and ignore writes; otherwise an access
            to them is not allowed.
        repeatable: whether a write that was begun by a process that died may be carried out again;
            see :class:`.Region`.

    Synchronization: handlers run one at a time, and so do the hooks. The bank has no lock.
    """

    def __init__(
        self,
        name: str,
        length: int,
        *,
        sizes: tuple[int, ...] = _ACCESS_SIZES,
        unaligned: bool = False,
        gaps: bool = False,
        repeatable: bool = False,
    ) -> None:
        if as_int("length", length) < 1:
            raise ValueError(f"{name}: length must be at least 1 byte, not {length}")
        if not sizes or not set(sizes) <= set(_ACCESS_SIZES):
            raise ValueError(f"{name}: sizes {sizes} must be some of {_ACCESS_SIZES}")
        self.name = name
        self.length = length
        self.repeatable = repeatable
        self._sizes = sizes
        self._unaligned = unaligned
        self._gaps = gaps
        self._registers: list[Register] = []

    def __repr__(self) -> str:
        return f"<RegisterBank {self.name}: {', '.join(map(repr, self._registers))}>"

    def __iter__(self) -> Iterator[Register]:
        return iter(tuple(self._registers))

    def add(
        self,
        name: str,
        offset: int,
        size: int,
        *,
        value: int = 0,
        mask: int | None = None,
        read: Callable[[], int] | None = None,
        write: Callable[[int], object] | None = None,
    ) -> Register:
        """Add a register.

        Args:
            name: for logs.
            offset: of its first byte.
            size: in bytes, any number.
            value: after a reset.
            mask: the bits that the guest can change; by default all if there is ``write``, and
                none otherwise.
            read: ``read()`` returns the value that the guest sees, instead of the stored one.
            write: ``write(value)`` is called after the guest has changed the register, with the
                stored value of all of it.

        Raises:
            ValueError: it is outside of the bank, or overlaps another one, or a value does not
                fit.
        """
        if as_int("size", size) < 1 or not 0 <= as_int("offset", offset) <= self.length - size:
            raise ValueError(
                f"{self.name}: register {name} at {offset:#x}..{offset + size:#x} must be within "
                f"0..{self.length:#x}"
            )
        ones = (1 << 8 * size) - 1
        if mask is None:
            mask = ones if write else 0
        if not (0 <= value <= ones and 0 <= mask <= ones):
            raise ValueError(
                f"{self.name}: register {name}: value {value:#x} and mask {mask:#x} must fit "
                f"{size} bytes"
            )
        register = Register(name, offset, size, value, mask, read, write)
        for other in self._registers:
            if other.offset < register.end and offset < other.end:
                same = name == other.name
                clash = "was added before" if same else f"overlaps register {other.name}"
                raise ValueError(f"{self.name}: register {name} {clash}")
        insort(self._registers, register, key=_offset)
        return register

    def reset(self) -> None:
        """Give each register its initial value. No hook is called."""
        for register in self._registers:
            register.value = register.initial

    def save(self) -> bytes:
        """Return the stored values, each at its offset; zeros in between."""
        data = bytearray(self.length)
        for register in self._registers:
            ones = (1 << 8 * register.size) - 1
            value = (register.value & ones).to_bytes(register.size, "little")
            data[register.offset : register.end] = value
        return bytes(data)

    def restore(self, data: bytes) -> None:
        """Have the values that the guest had written when ``data`` was saved. No hook is called.

        The bits that the guest cannot change have their initial values.

        Raises:
            ValueError: ``data`` is of another length.
        """
        if len(data) != self.length:
            raise ValueError(f"{self.name}: state of {len(data)} bytes must have {self.length}")
        for register in self._registers:
            saved = int.from_bytes(data[register.offset : register.end], "little")
            register.value = register.initial & ~register.mask | saved & register.mask

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads; a handler.

        Raises:
            GuestError: the access is not allowed.
        """
        value = 0
        for piece in self._pieces(offset, size):
            value |= (self._load(piece.register) >> piece.skip & piece.ones) << piece.shift
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes; a handler.

        Raises:
            GuestError: the access is not allowed.
        """
        for register, skip, shift, ones in self._pieces(offset, size):
            mask = register.mask & ones << skip
            register.value = register.value & ~mask | value >> shift << skip & mask
            if register.write is not None:
                try:
                    register.write(register.value)
                except Exception as error:
                    self._name(register, error)
                    raise

    def _load(self, register: Register) -> int:
        """Return the value of a register as the guest sees it."""
        if register.read is None:
            return register.value
        try:
            return checked(register.read(), register.size)
        except BadValueError as error:
            raise BadValueError(f"{self.name}: register {register.name}: {error}") from None
        except Exception as error:
            self._name(register, error)
            raise

    def _name(self, register: Register, error: Exception) -> None:
        error.add_note(f"in register {register.name} at offset {register.offset:#x} of {self.name}")

    def _pieces(self, offset: int, size: int) -> list[_Piece]:
        """Return the registers of an access; GuestError if it is not allowed."""
        if size not in self._sizes:
            allowed = " or ".join(map(str, self._sizes))
            raise GuestError(f"{self.name}: size {size} at offset {offset:#x} must be {allowed}")
        if offset % size and not self._unaligned:
            raise GuestError(f"{self.name}: {size} bytes at offset {offset:#x} must be aligned")
        end = offset + size
        pieces: list[_Piece] = []
        covered = 0
        first = max(bisect_right(self._registers, offset, key=_offset) - 1, 0)
        for number in range(first, len(self._registers)):
            register = self._registers[number]
            if register.offset >= end:
                break
            start = max(register.offset, offset)
            count = min(register.end, end) - start
            if count > 0:
                skip, shift = 8 * (start - register.offset), 8 * (start - offset)
                pieces.append(_Piece(register, skip, shift, (1 << 8 * count) - 1))
                covered += count
        if covered < size and not self._gaps:
            raise GuestError(f"{self.name}: no register has the {size} bytes at {offset:#x}")
        return pieces
