"""Debian's Chromium without a display, driven by selenium; or the reason why a test is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from tests.images import tools

Driver: TypeAlias = Any
"""Selenium's driver; the package may be missing."""

_OPTIONS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1280,1000", "--disable-dev-shm-usage"),
)
_TIMEOUT_S: Final = 60
_WHEN_DRAWN: Final = """
    const done = arguments[0];
    const look = () => document.documentElement.dataset.drawn === 'details' ? done(true)
      : setTimeout(look, 10);
    look();
"""


@contextmanager
def browser(profile: Path) -> Iterator[Driver]:
    """Start Chromium with a new profile; yield selenium's driver.

    Args:
        profile: an empty folder.
    """
    tools.module("selenium", "selenium")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = tools.command("chromium")
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(tools.command("chromedriver")))
    try:
        driver.set_script_timeout(_TIMEOUT_S)
        driver.set_page_load_timeout(_TIMEOUT_S)
        yield driver
    finally:
        driver.quit()


def open_page(driver: Driver, page: Path) -> None:
    """Open a timeline, and wait until all of it is drawn."""
    driver.get(page.as_uri())
    driver.execute_async_script(_WHEN_DRAWN)


def resize(driver: Driver, width: int, height: int, scheme: str) -> None:
    """Let a page see a screen of a size, and a light or dark colour scheme."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
