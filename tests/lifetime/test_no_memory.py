"""Python has no memory for any one object of an operation, or for all objects from one on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.places import folder_for_mapping

pytestmark = pytest.mark.slow

PROGRAM = """
import gc, logging, sys
import _testcapi
from pathlib import Path
from xenmapcache import DmaDirection, MapCache, MockHypervisor, mapping, open_backend

sys.unraisablehook = lambda _: None  # finalizers have no memory, too
logging.disable()  # a lease whose release failed is held when its cache is closed
source, count, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if source == "mock":
    guest = MockHypervisor().create_domain(memory="256K", holes=[(0x9000, 0x1000)])
    guest.write(0x1000, b"gggg")
    name, backend = "xenmapcache-mock", open_backend("mock", domain=guest)
else:
    name, backend = source, open_backend("raw", path=source)
    assert not backend.copies(0, 1)  # it is mapped, and the file lease is taken by now
operations = {
    "read": lambda cache: cache.read(0x1000, 4),
    "read next to a hole": lambda cache: cache.read(0x8000, 4),
    "evict": lambda cache: cache.read(0x10000, 4),
    "lease": lambda cache: cache.map_dma(
        0x3000, 0x2000, owner="d", direction=DmaDirection.TO_DEVICE
    ).release(),
}

def once(operation, number):  # whether the operation had all the memory that it wanted
    cache = MapCache(backend, bucket_shift=14, max_resident="64K")
    for index in range(4) if operation == "evict" else ():
        cache.read(index << 14, 4)
    work = operations[operation]
    complete = True
    _testcapi.set_nomemory(number, number + count)
    try:
        work(cache)
    except MemoryError:
        complete = False
    finally:
        _testcapi.remove_mem_hooks()
    assert cache.read(0x1000, 4) == b"gggg"
    cache.close(force=True)
    del cache
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    assert name not in maps, (operation, number, maps)
    assert mapping.live_mappings() == 0, (operation, number)
    return complete

for operation in operations:
    once(operation, 1 << 20)  # what is imported and made once
gc.disable()
gc.collect()
gc.freeze()
for operation in operations:
    number = complete = 0
    while complete < 5:  # what CPython can do without, such as a larger free list, ends nothing
        complete = complete + 1 if once(operation, number) else 0
        number += step
    assert number > 50
"""


@pytest.fixture
def mappable(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files can be mapped."""
    yield from folder_for_mapping(tmp_path)


@pytest.mark.parametrize(("count", "step"), [(1, 1), (1 << 20, 25)], ids=["one", "all from one on"])
@pytest.mark.parametrize("source", ["mock", "raw"])
def test_nothing_of_a_guest_stays_mapped(
    mappable: Path, source: str, count: int, step: int
) -> None:
    """Whichever allocation fails, the memory is unmapped, and the next operation works."""
    pytest.importorskip("_testcapi")
    path = mappable / "guest.raw"
    path.write_bytes(b"g" * (256 << 10))
    given = str(path) if source == "raw" else source
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given, str(count), str(step)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
