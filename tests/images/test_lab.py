"""The images of a real guest: they are there, and are of one moment."""

from __future__ import annotations

import pytest

from tests.images.lab import FORMS, Images
from tests.images.lab.machine import MEMORY_BYTES
from tests.xen.lab.prerequisites import LabUnavailableError
from xenmapcache import open_source
from xenmapcache.address import MiB

pytestmark = pytest.mark.images

RANGES = ((0, 0xA0000), (0xC0000, MEMORY_BYTES - 0xC0000))
"""Memory of a PC, without the hole for video memory and ROM."""


def test_all_forms_exist(lab_images: Images) -> None:
    """Each form that is not optional is there, and an absent one is named."""
    for form in FORMS:
        assert form.optional or lab_images.path(form.file).stat().st_size
    with pytest.raises(LabUnavailableError, match=r"absent\.kdump"):
        lab_images.path("absent.kdump")


@pytest.mark.parametrize("file", ["plain.elf", "moved.elf"])
def test_elf_core_has_the_same_memory_as_the_flat_image(lab_images: Images, file: str) -> None:
    """Both were written while the guest was stopped."""
    flat = lab_images.path("guest.raw").read_bytes()
    with open_source(lab_images.path(file)) as backend:
        for start, length in RANGES:
            for address in range(start, start + length, MiB):
                size = min(MiB, start + length - address)
                mapping = backend.map(address >> 12, size >> 12, writable=False)
                assert mapping.view(0, size) == flat[address : address + size]
                del mapping


def test_guest_was_ready(lab_images: Images) -> None:
    """It had started its processes when it was stopped."""
    assert "=== ready" in lab_images.path("serial.log").read_text()
    assert "CR3=" in lab_images.path("registers.txt").read_text()
