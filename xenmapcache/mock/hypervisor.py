"""MockHypervisor: the mock's machine, which has frames of memory and domains."""

from __future__ import annotations

from collections.abc import Iterable

from ..address import PAGE_MASK, PAGE_SHIFT, GiB, parse_size
from .domain import MockDomain
from .frames import Frames
from .saving import MockImage

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
        type: str = "hvm",  # noqa: A002 - the word that xl uses
    ) -> MockDomain:
        """Create a guest, its memory zeroed.

        Args:
            memory: its size in bytes, whole pages, or as ``"256M"``; at most 64 GiB.
            holes: ``(address, length)`` pairs, page-aligned, that are not there.
            vcpus: how many it has, at most 128.
            type: ``"hvm"``, ``"pvh"`` or ``"pv"``.

        Raises:
            ValueError: not whole pages, too much memory, a hole beyond the end, no such type,
                or no such number of vCPUs.
            ClosedError: a parent process has made the machine.
        """
        size = parse_size(memory)
        if not 0 < size <= MAX_MEMORY or size & PAGE_MASK:
            raise ValueError(
                f"memory {size:#x} must be whole pages of 0x1000 bytes, and at most {MAX_MEMORY:#x}"
            )
        domid = len(self.domains) + 1
        domain = MockDomain(self._frames, domid, size >> PAGE_SHIFT, holes, vcpus=vcpus, type=type)
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
        domain = self.create_domain(memory="4k", vcpus=image.vcpus, type=image.type)
        domain.p2m.restore(image.end, image.pages)
        return domain
