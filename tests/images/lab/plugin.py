"""The fixture ``lab_images``, for tests that are marked ``images``."""

from __future__ import annotations

import pytest

from tests.xen.lab.prerequisites import LabUnavailableError

from . import Images, images


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes a machine without images a failure."""
    parser.addoption(
        "--images-required", action="store_true", help="fail if images of a guest cannot be made"
    )


@pytest.fixture(scope="session")
def lab_images(request: pytest.FixtureRequest) -> Images:
    """The memory of a real Linux guest in all forms; see tests/images/lab."""
    try:
        return images()
    except LabUnavailableError as error:
        if request.config.getoption("images_required"):
            pytest.fail(f"no images of a guest: {error}", pytrace=False)
        pytest.skip(f"no images of a guest: {error}")
