"""Fixtures over the stand-in, for the conftest.py of the folders that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from . import FakeXen, build

MakeFake = Callable[..., FakeXen]


@pytest.fixture
def make_fake(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[MakeFake]:
    """A function that makes a stand-in of a variant, with a state of its own."""
    folder = tmp_path_factory.getbasetemp() / "fake_xen"  # one build for the whole session
    with ExitStack() as stack:

        def make(
            variant: str = "",
            *,
            pages: int = 64,
            holes: list[tuple[int, int]] | None = None,
            vcpus: int = 1,
        ) -> FakeXen:
            fake = FakeXen(
                build(folder, variant),
                tmp_path / "fake_xen",
                pages=pages,
                holes=holes or [],
                vcpus=vcpus,
            )
            stack.callback(fake.close)
            return fake

        yield make
