"""MockHypervisor: the mock's machine, which has frames of memory and domains."""

from __future__ import annotations

from collections.abc import Iterable

from ..address import PAGE_MASK, PAGE_SHIFT, GiB, parse_size
from .domain import MockDomain
from .frames import Frames
from .saving import MockImage

TYPES = {"x86-64": ("hvm", "pvh", "pv"), "arm64": ("pvh",)}
"""The types of guests, by machine; the first is the default."""
MAX_MEMORY = 64 * GiB
"""The most that a guest is created with: mapping more of it takes longer than a test may."""


class MockHypervisor:
    """The machine. Its memory is freed when no domain and no mapping shows it.

    Attributes:
        domains: the domains, by domid.
    """

    def __init__(self) -> None:
        self.domains: dict[int, MockDomain] = {}
        self._frames = Frames()

    def __repr__(self) -> str:
        return f"<MockHypervisor with {len(self.domains)} domains>"

    @property
    def fd(self) -> int:
        """The number of the memfd that holds all frames."""
        return self._frames.fileno()

    def create_domain(
        self,
        *,
        memory: int | str = "64M",
        holes: Iterable[tuple[int, int]] = (),
        vcpus: int = 1,
        type: str | None = None,  # noqa: A002 - the word that xl uses
        machine: str = "x86-64",
    ) -> MockDomain:
        """Create a guest, its memory zeroed.

        Args:
            memory: its size in bytes, whole pages, or as ``"256M"``; at most 64 GiB.
            holes: ``(address, length)`` pairs, page-aligned, that are not there.
            vcpus: how many it has, at most 128.
            type: ``"hvm"``, ``"pvh"`` or ``"pv"``; by default ``"hvm"``, and ``"pvh"`` of an arm64
                guest, which has no other type.
            machine: ``"x86-64"`` or ``"arm64"``.

        Raises:
            ValueError: not whole pages, too much memory, a hole beyond the end, no such type
                or machine, or no such number of vCPUs.
            ClosedError: a parent process has made the machine.
        """
        size = parse_size(memory)
        if not 0 < size <= MAX_MEMORY or size & PAGE_MASK:
            raise ValueError(
                f"memory must be 0x1000 to {MAX_MEMORY:#x} bytes, a multiple of 0x1000, "
                f"not {size:#x}"
            )
        domid = len(self.domains) + 1
        domain = MockDomain(
            self._frames,
            domid,
            size >> PAGE_SHIFT,
            holes,
            vcpus=vcpus,
            type=_type_of(machine, type),
            machine=machine,
        )
        self.domains[domid] = domain
        return domain

    def restore(self, image: MockImage) -> MockDomain:
        """Create a guest from an image, as ``xl restore`` does.

        Args:
            image: what :meth:`.MockDomain.suspend` returned, with all its pages sent.

        Raises:
            ValueError: the image is not complete.
        """
        if not image.complete:
            raise ValueError("the image is not complete: call image.send() first")
        domain = self.create_domain(memory="4k", **image.kind)
        domain.p2m.restore(image.end, image.pages)
        return domain


def _type_of(machine: str, wanted: str | None) -> str:
    """Return a guest's type; ValueError if a machine has no such guests, or is unknown."""
    if machine not in TYPES:
        raise ValueError(f"machine must be one of {tuple(TYPES)}, not {machine!r}")
    types = TYPES[machine]
    if wanted is not None and wanted not in types:
        raise ValueError(f"type must be one of {types} for {machine}, not {wanted!r}")
    return wanted or types[0]
