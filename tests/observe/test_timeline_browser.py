"""The page in a real Chromium: what a person sees, points at, types and presses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.observe.chromium import Driver, browser, open_page, resize
from tests.observe.recordings import START, taken
from tests.observe.timeline_pages import HOSTILE, busy, write
from xenmapcache.cli import main
from xenmapcache.events import Invalidated, LeaseReleased

pytestmark = pytest.mark.slow

RED = "rgb(211, 34, 42)"
HOSTILE_LEASE = 500_000
RANGE = "const [a, b] = document.getElementById('dma').layout.xaxis.range; return b - a;"
BARS = """return [...document.querySelectorAll('#dma .barlayer .point path')]
  .filter(each => getComputedStyle(each).fill === arguments[0]
    && Number(getComputedStyle(each).fillOpacity || 1) > 0.5
    && Number(getComputedStyle(each).opacity) > 0.5);"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A browser for all of the tests."""
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with one stale lease of a hostile owner, and one of many events."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    folder = tmp_path_factory.mktemp("pages")
    stale = (
        taken(1, "disk0")._replace(start=0x100000),
        LeaseReleased(START + 500_000, 1),
        taken(2, f"net {HOSTILE}"),
        Invalidated(START + 1_000_000, 1, 5, (2,), 2500),
        LeaseReleased(START + 2_000_000, 2, True, 0, 2),
    )
    made = {}
    for name, events in (("stale", stale), ("busy", busy(20_000))):
        path = write(folder / f"{name}.jsonl", *events)
        made[name] = folder / f"{name}.html"
        assert main(["timeline", str(path), "-o", str(made[name])]) == 0
    return made


@pytest.fixture
def stale(driver: Driver, pages: dict[str, Path]) -> Iterator[Driver]:
    """The page with a stale lease; afterwards its console has to be empty."""
    resize(driver, 1280, 1000, "light")
    driver.get_log("browser")
    open_page(driver, pages["stale"])
    yield driver
    assert driver.get_log("browser") == []


def wait(driver: Driver, condition: str) -> None:
    """Wait until a condition of JavaScript is true."""
    driver.execute_async_script(
        "const done = arguments[0];"
        f"const look = () => ({condition}) ? done(true) : setTimeout(look, 10); look();"
    )


def press(driver: Driver, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(key).perform()


def test_the_red_lease_says_whose_it_is(stale: Driver) -> None:
    """There is one red bar; pointing at it shows owner, address and warning, as text."""
    from selenium.webdriver import ActionChains

    (red,) = stale.execute_script(BARS, RED)
    ActionChains(stale).move_to_element(red).perform()
    wait(stale, "document.querySelector('#dma .hoverlayer .hovertext')")
    text = stale.execute_script(
        "return document.querySelector('#dma .hoverlayer .hovertext').textContent"
    )
    for part in ("net </script><img src=x", "stale DMA", "lease 2: 0x5000, 8 KiB", "STALE"):
        assert part in text
    assert stale.execute_script("return document.querySelectorAll('img').length") == 0


def test_the_invalidation_is_a_line(stale: Driver) -> None:
    """It has a mark, whose text says what happened."""
    data = stale.execute_script(
        "return document.getElementById('dma').data.find(each => each.mode?.includes('markers'))"
    )
    assert data["x"] == [0.000999]
    assert "1 DMA lease held across it" in data["hovertext"][0]


def test_search_by_owner_and_address(stale: Driver) -> None:
    """What does not match is faded, in the chart, and hidden in the table; Enter zooms."""
    from selenium.webdriver.common.keys import Keys

    press(stale, "/")
    assert stale.execute_script("return document.activeElement.id") == "search"
    box = stale.switch_to.active_element
    box.send_keys("disk0")
    assert stale.execute_script(BARS, RED) == []
    rows = "return [...document.querySelectorAll('tbody tr')].map(each => each.hidden)"
    assert sorted(stale.execute_script(rows)) == [False, True]
    assert "1 bar of 1 owner match" in stale.execute_script(
        "return document.getElementById('status').textContent"
    )
    box.clear()
    box.send_keys("0x5fff")
    assert len(stale.execute_script(BARS, RED)) == 1
    box.send_keys(Keys.ENTER)
    assert stale.execute_script(RANGE) < 2.08e-3 * 1.2
    box.send_keys("00000")
    assert "Nothing matches" in stale.execute_script(
        "return document.getElementById('status').textContent"
    )
    box.send_keys(Keys.ESCAPE)
    assert len(stale.execute_script(BARS, RED)) == 1


def test_zoom_and_pan(stale: Driver) -> None:
    """Keys, buttons and the mouse change the range of all charts together."""
    from selenium.webdriver import ActionChains

    full = stale.execute_script(RANGE)
    press(stale, "+")
    assert stale.execute_script(RANGE) == pytest.approx(full / 2)
    press(stale, "0")
    assert stale.execute_script(RANGE) == pytest.approx(full)
    stale.find_element("id", "closer").click()
    stale.find_element("id", "right").click()
    assert stale.execute_script(RANGE) == pytest.approx(full / 2)
    stale.find_element("id", "all").click()
    chart = stale.find_element("css selector", "#dma .nsewdrag")
    drag = ActionChains(stale).move_to_element(chart).click_and_hold()
    drag.move_by_offset(200, 0).release().perform()
    wait(stale, f"(() => {{ {RANGE} }})() < {full / 3}")
    wait(
        stale,
        "document.getElementById('addresses').layout.xaxis.range[0] === "
        "document.getElementById('dma').layout.xaxis.range[0]",
    )
    stale.find_element("id", "all").click()
    stale.find_element("css selector", "tr[data-owner=disk0] button").click()
    assert stale.execute_script(RANGE) < full


def test_light_and_dark(stale: Driver) -> None:
    """The page follows the system's scheme, and a key switches it."""
    background = "return getComputedStyle(document.body).backgroundColor"
    assert stale.execute_script(background) == "rgb(255, 255, 255)"
    press(stale, "t")
    assert stale.execute_script(background) == "rgb(18, 22, 27)"
    assert stale.execute_script(BARS, RED) == []
    assert len(stale.execute_script(BARS, "rgb(255, 77, 77)")) == 1
    resize(stale, 1280, 1000, "dark")
    open_page(stale, Path(stale.current_url.removeprefix("file://")))
    assert stale.execute_script(background) == "rgb(18, 22, 27)"


def test_paper_and_telephones(stale: Driver) -> None:
    """A narrow screen needs no sideways scrolling; paper is light, narrow and without buttons."""
    resize(stale, 390, 844, "dark")
    open_page(stale, Path(stale.current_url.removeprefix("file://")))
    assert stale.execute_script("return document.documentElement.scrollWidth") <= 390
    stale.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert stale.execute_script("return document.documentElement.dataset.theme") == "light"
    assert stale.execute_script("return document.getElementById('dma').layout.width") == 700
    stale.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert stale.execute_script("return document.documentElement.dataset.theme") == "dark"
    assert len(stale.print_page()) > 10_000


def test_details_come_with_zoom(driver: Driver, pages: dict[str, Path]) -> None:
    """A large recording shows merged bars at first; zoomed in, each lease has its bar."""
    resize(driver, 1280, 1000, "light")
    driver.get_log("browser")
    open_page(driver, pages["busy"])
    texts = (
        "return document.getElementById('dma').data.flatMap(each => each.type === 'bar' ? "
        "each.hovertext : [])"
    )
    first = driver.execute_script(texts)
    assert len(first) <= 1500
    assert any("leases, " in text for text in first)
    for _ in range(7):
        press(driver, "+")
    close = driver.execute_script(texts)
    assert close
    assert not any("leases, " in text for text in close)
    assert driver.get_log("browser") == []


def test_charts_are_drawn_when_they_come_into_sight(driver: Driver, pages: dict[str, Path]) -> None:
    """So the page opens in the time of what it shows. Paper needs all of them."""
    resize(driver, 1280, 400, "light")
    driver.get_log("browser")
    open_page(driver, pages["busy"])
    drawn = "return [...document.querySelectorAll('.chart')].filter(each => each.data).length"
    assert driver.execute_script(drawn) < 4
    driver.execute_script("document.getElementById('times').scrollIntoView()")
    wait(driver, "document.getElementById('times').data")
    press(driver, "+")
    wait(
        driver,
        "document.getElementById('times').layout.xaxis.range[0] === "
        "document.getElementById('dma').layout.xaxis.range[0]",
    )
    open_page(driver, pages["busy"])
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(drawn) == 5
    assert driver.get_log("browser") == []
