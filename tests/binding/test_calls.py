"""The functions of both libraries: what C receives, what comes back, when they may be called."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY

import pytest

from tests.descriptors import open_files
from tests.fake_xen import DOMID, Behaviour, FakeXen, real_library
from tests.fake_xen.child import in_child
from tests.fake_xen.fixtures import MakeFake
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.binding.control import Control
from xenmapcache.binding.declarations import TOOL_LOG
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.handle import Handle, positive_errors
from xenmapcache.errors import (
    BackendUnavailableError,
    ClosedError,
    UnsupportedOperationError,
    XenCallError,
)

PROT = mmap.PROT_READ | mmap.PROT_WRITE
PRESENT, MIXED = array("Q", [2, 3]), array("Q", [4, 5, 6, 99])
MAP, MAP2, BULK = "xenforeignmemory_map", "xenforeignmemory_map2", "xc_map_foreign_bulk"


@pytest.fixture(params=[MAP2, MAP, BULK])
def call(request: pytest.FixtureRequest) -> str:
    """Each of the three functions that map."""
    name: str = request.param
    return name


@pytest.fixture
def owner(call: str, make_fake: MakeFake) -> FakeXen:
    """A stand-in that exports the function; 64 pages, gfn 5 a hole."""
    return make_fake("OLD" if call == MAP else "", holes=[(5, 1)])


@pytest.fixture
def handle(call: str, owner: FakeXen, binding: str) -> Iterator[Control | ForeignMemory]:
    """A handle whose ``map`` calls the function; C's handle was used properly."""
    kind = Control if call == BULK else ForeignMemory
    with kind(binding=binding, library=owner.library) as handle:
        yield handle
    assert owner.count(handle.close_call) == 1
    assert owner.misuses == 0


def peek(address: int, length: int) -> bytes:
    # SAFETY: the caller has just mapped it.
    return ctypes.string_at(address, length)


def unmap(address: int, pages: int) -> None:
    libc.unmap(address, pages * PAGE_SIZE)


def test_map_passes_arguments(handle: Control | ForeignMemory, call: str, owner: FakeXen) -> None:
    """Each function gets its own order of arguments, and the frames that were asked for."""
    address, errors = handle.map(DOMID, PROT, PRESENT)
    received = owner.calls[-1]
    expected = {
        MAP2: (ANY, DOMID, 0, PROT, 0, 2, PRESENT.buffer_info()[0], ANY),
        MAP: (ANY, DOMID, PROT, 2, PRESENT.buffer_info()[0], ANY),
        BULK: (ANY, DOMID, PROT, PRESENT.buffer_info()[0], ANY, 2),
    }
    assert (received.name, received.arguments) == (call, expected[call])
    assert received.arguments[0] != 0
    assert received.gfns == (2, 3)
    assert errors is None
    unmap(address, 2)


def test_map_shows_the_guests_memory(handle: Control | ForeignMemory, owner: FakeXen) -> None:
    """What the guest wrote is at the address that comes back."""
    owner.write(3 * PAGE_SIZE, b"from the guest")
    address, _ = handle.map(DOMID, PROT, PRESENT)
    assert peek(address + PAGE_SIZE, 14) == b"from the guest"
    unmap(address, 2)


@pytest.mark.parametrize("behaviour", [None, Behaviour.SIGN])
def test_page_errors_are_positive(
    handle: Control | ForeignMemory, call: str, owner: FakeXen, behaviour: Behaviour | None
) -> None:
    """A page's errno is positive in Python, whichever sign it had in err[]."""
    if behaviour:
        owner.plan(call, behaviour)
    owner.set_error(errno.EPERM, 6)
    address, errors = handle.map(DOMID, PROT, MIXED)
    assert errors == bytes([0, errno.EINVAL, errno.EPERM, errno.EINVAL])
    unmap(address, 4)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ESRCH, 0])
def test_null_raises_with_the_calls_errno(
    handle: Control | ForeignMemory, call: str, owner: FakeXen, number: int
) -> None:
    """NULL is an error though err[] is all zeros; without an errno it is EIO."""
    owner.plan(call, Behaviour.FAIL, number)
    with pytest.raises(XenCallError) as caught:
        handle.map(DOMID, PROT, PRESENT)
    assert caught.value.errno == (number or errno.EIO)
    assert (caught.value.call, caught.value.domid) == (call, DOMID)
    assert errno.errorcode[caught.value.errno] in str(caught.value)


def test_a_pointer_with_all_pages_failed_is_no_exception(
    handle: Control | ForeignMemory, call: str, owner: FakeXen
) -> None:
    """The caller gets the address to unmap, and one errno a page; errno itself is not looked at."""
    owner.plan(call, Behaviour.ALL_PAGES, errno.EPERM)
    address, errors = handle.map(DOMID, PROT, PRESENT)
    assert errors == bytes([errno.EPERM] * 2)
    unmap(address, 2)


def test_no_such_domain_fails_each_page(handle: Control | ForeignMemory) -> None:
    """As with the real libraries: a pointer, and ESRCH for every page."""
    address, errors = handle.map(DOMID + 1, PROT, PRESENT)
    assert errors == bytes([errno.ESRCH] * 2)
    unmap(address, 2)


def test_zero_pages(handle: Control | ForeignMemory, call: str) -> None:
    """No pages are refused by the library, not by a crash of ours."""
    with pytest.raises(XenCallError) as caught:
        handle.map(DOMID, PROT, array("Q"))
    assert caught.value.errno == errno.EINVAL


def test_errno_of_an_earlier_call_is_not_taken(
    handle: Control | ForeignMemory, call: str, owner: FakeXen
) -> None:
    """A call that fails without setting errno does not report what another one left."""
    owner.plan(call, Behaviour.FAIL, errno.ENOSPC)
    owner.plan(call, Behaviour.FAIL, 0, nth=2)
    with pytest.raises(XenCallError, match="ENOSPC"):
        handle.map(DOMID, PROT, PRESENT)
    with pytest.raises(XenCallError, match="EIO"):
        handle.map(DOMID, PROT, PRESENT)


def test_map2_at_a_fixed_address(memory: ForeignMemory, fake: FakeXen) -> None:
    """Address and flags reach map2, and the pages are where they were asked for."""
    fake.write(2 * PAGE_SIZE, b"second")
    address = libc.reserve(2 * PAGE_SIZE)
    result, errors = memory.map(
        DOMID, mmap.PROT_READ, PRESENT, address=address, flags=libc.MAP_FIXED
    )
    arguments = (ANY, DOMID, address, mmap.PROT_READ, libc.MAP_FIXED, 2, ANY, ANY)
    assert fake.calls[-1] == (MAP2, arguments, (2, 3))
    assert (result, errors) == (address, None)
    assert peek(address, 6) == b"second"
    unmap(address, 2)


def test_open_and_close_pass_a_logger(fake: FakeXen, binding: str) -> None:
    """Both libraries get loggers of ours, no flags, and their own handle back at close."""
    real_library(TOOL_LOG)
    with (
        Control(binding=binding, library=fake.library),
        ForeignMemory(binding=binding, library=fake.library),
    ):
        pass
    control, memory, close_memory, close_control = fake.calls
    assert (control.name, memory.name) == ("xc_interface_open", "xenforeignmemory_open")
    assert control.arguments[0] == control.arguments[1] != 0
    assert memory.arguments[0] != 0
    assert (control.arguments[2:], memory.arguments[1:]) == ((0,), (0,))
    assert (close_memory.name, close_control.name) == (
        "xenforeignmemory_close",
        "xc_interface_close",
    )
    assert fake.misuses == 0


def test_unmap_passes_arguments(memory: ForeignMemory, fake: FakeXen) -> None:
    """Unmap gets the address and the number of pages."""
    address, _ = memory.map(DOMID, PROT, PRESENT)
    memory.unmap(address, 2)
    assert fake.calls[-1] == ("xenforeignmemory_unmap", (ANY, address, 2), ())


def test_restrict(memory: ForeignMemory, fake: FakeXen) -> None:
    """After restrict another domain is refused, as a failed call and with EPERM."""
    memory.restrict(DOMID + 1)
    assert fake.calls[-1] == ("xenforeignmemory_restrict", (ANY, DOMID + 1), ())
    with pytest.raises(XenCallError) as caught:
        memory.map(DOMID, PROT, PRESENT)
    assert caught.value.errno == errno.EPERM
    assert "restricted" in caught.value.hint


def test_resources(memory: ForeignMemory, fake: FakeXen) -> None:
    """A resource is mapped, sized and unmapped with the arguments in the header's order."""
    resource, address = memory.map_resource(DOMID, 1, 2, 3, 4, PROT)
    mapped = fake.calls[-1]
    assert mapped.name == "xenforeignmemory_map_resource"
    assert mapped.arguments == (ANY, DOMID, 1, 2, 3, 4, 0, PROT, 0)
    assert peek(address, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
    memory.unmap_resource(resource)
    unmapped = fake.calls[-1]
    assert unmapped.name == "xenforeignmemory_unmap_resource"
    assert unmapped.arguments == (mapped.arguments[0], resource)
    assert memory.resource_size(DOMID, 1, 2) == 2 * PAGE_SIZE
    sized = fake.calls[-1]
    assert (sized.name, sized.arguments[1:]) == ("xenforeignmemory_resource_size", (DOMID, 1, 2))


CHECKED: dict[str, Callable[[ForeignMemory], object]] = {
    "unmap": lambda memory: memory.unmap(0x1000, 1),
    "restrict": lambda memory: memory.restrict(DOMID),
    "map_resource": lambda memory: memory.map_resource(DOMID, 0, 0, 0, 1, PROT),
    "unmap_resource": lambda memory: memory.unmap_resource(0x1000),
    "resource_size": lambda memory: memory.resource_size(DOMID, 0, 0),
}


@pytest.mark.parametrize("name", CHECKED)
def test_every_other_failure_raises(memory: ForeignMemory, fake: FakeXen, name: str) -> None:
    """Each function that is not a map raises with its own name and errno when it fails."""
    fake.plan(f"xenforeignmemory_{name}", Behaviour.FAIL, errno.EBUSY)
    with pytest.raises(XenCallError) as caught:
        CHECKED[name](memory)
    assert (caught.value.call, caught.value.errno) == (f"xenforeignmemory_{name}", errno.EBUSY)


# --- threads, close, fork ---------------------------------------------------------


@pytest.mark.timeout(60)
def test_calls_release_the_interpreter_lock(
    handle: Control | ForeignMemory, call: str, owner: FakeXen
) -> None:
    """While C blocks, this thread runs Python that unblocks C."""
    owner.plan(call, Behaviour.BLOCK)
    with ThreadPoolExecutor() as pool:
        mapping = pool.submit(handle.map, DOMID, PROT, PRESENT)
        owner.wait_until_blocked()
        assert not mapping.done()
        owner.unblock()
        address, errors = mapping.result()  # the library fails it if it was not unblocked in time
    assert errors is None
    unmap(address, 2)


@pytest.mark.timeout(60)
def test_close_during_a_call(handle: Control | ForeignMemory, call: str, owner: FakeXen) -> None:
    """Close does not wait, later calls are refused, and C's handle is freed after the call."""
    close = handle.close_call
    owner.plan(call, Behaviour.BLOCK)
    with ThreadPoolExecutor() as pool:
        mapping = pool.submit(handle.map, DOMID, PROT, PRESENT)
        owner.wait_until_blocked()
        handle.close()
        assert owner.count(close) == 0
        with pytest.raises(ClosedError):
            handle.map(DOMID, PROT, PRESENT)
        owner.unblock()
        address, _ = mapping.result()
    assert owner.count(close) == 1
    unmap(address, 2)


def test_use_after_close(handle: Control | ForeignMemory, call: str, owner: FakeXen) -> None:
    """A closed handle raises ClosedError before C is reached."""
    handle.close()
    with pytest.raises(ClosedError, match="is closed"):
        handle.map(DOMID, PROT, PRESENT)
    assert owner.count(call) == 0


def test_double_close(handle: Control | ForeignMemory, owner: FakeXen) -> None:
    """The second close does nothing."""
    handle.close()
    handle.close()
    assert owner.count(handle.close_call) == 1


def test_forgotten_handle(fake: FakeXen, binding: str) -> None:
    """A handle that nobody closed is closed when it dies, with a ResourceWarning."""
    memory: ForeignMemory | None = ForeignMemory(binding=binding, library=fake.library)
    assert memory is not None
    with pytest.warns(ResourceWarning, match="unclosed libxenforeignmemory handle"):
        memory = None
    assert fake.count("xenforeignmemory_close") == 1


def refuses(handle: Handle) -> bool:
    """Tell whether a handle says that it belongs to the parent, and can be closed all the same."""
    try:
        handle.call(handle.required[0])
    except ClosedError as error:
        handle.close()
        return "forked" in str(error)
    return False


def test_forked_child_is_refused(handle: Control | ForeignMemory, owner: FakeXen) -> None:
    """A child gets ClosedError and reaches C neither by a call nor by close; the parent goes on."""
    before = owner.calls  # kept in memory that the child shares
    assert in_child(lambda: refuses(handle)) == 0
    assert owner.calls == before
    address, _ = handle.map(DOMID, PROT, PRESENT)
    unmap(address, 2)


def forks_during_a_call(fake: FakeXen, binding: str) -> bool:
    """Close a handle during a call, and fork; tell what the child has closed, then the parent."""
    memory = ForeignMemory(binding=binding, library=fake.library)
    pids: list[int] = []

    def restrict(*_: object, **__: object) -> tuple[int, int]:
        memory.close()
        pids.append(os.fork())
        if pids[0]:
            pids.append(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]))
        return 0, 0

    memory._functions["xenforeignmemory_restrict"] = restrict  # type: ignore[assignment] # called directly only
    memory.restrict(DOMID)
    closed = fake.count("xenforeignmemory_close")
    if not pids[0]:
        os._exit(closed)
    return (pids[1], closed) == (0, 1)


def test_a_fork_during_a_call(fake: FakeXen, binding: str) -> None:
    """A child that was forked off inside a call does not close what the parent has closed."""
    assert in_child(lambda: forks_during_a_call(fake, binding)) == 0


def test_an_errno_that_fits_no_byte() -> None:
    """It is not 0, which would be a page that can be touched, in either sign."""
    assert positive_errors(array("i", [256, -256, 0, -512])) == bytes([255, 255, 0, 255])


def test_a_handle_leaves_no_file_open(fake: FakeXen, binding: str) -> None:
    """Neither one that was closed, nor one that could not be opened."""
    ForeignMemory(binding=binding, library=fake.library).close()
    before = open_files()
    ForeignMemory(binding=binding, library=fake.library).close()
    assert open_files() <= before
    fake.plan("xenforeignmemory_open", Behaviour.FAIL, errno.ENODEV)
    with pytest.raises(BackendUnavailableError):
        ForeignMemory(binding=binding, library=fake.library)
    assert open_files() <= before


def test_a_failure_tells_what_xen_said(
    memory: ForeignMemory, fake: FakeXen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint is what the errno means, and Xen's own words after it."""
    monkeypatch.setattr(memory._log, "drain", lambda: "said Xen")
    fake.plan("xenforeignmemory_restrict", Behaviour.FAIL, errno.EINVAL)
    with pytest.raises(XenCallError) as caught:
        memory.restrict(DOMID)
    assert caught.value.hint == "the hypervisor or kernel refused the arguments; said Xen"


def test_a_handle_that_a_child_forgets(fake: FakeXen, binding: str) -> None:
    """It is the parent's to close, so the child is not warned of it."""
    handles = [ForeignMemory(binding=binding, library=fake.library)]

    def forget() -> bool:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            handles.clear()
            gc.collect()
        return not told

    assert in_child(forget) == 0
    handles[0].close()


def test_the_first_number_that_does_not_fit_an_int(memory: ForeignMemory, fake: FakeXen) -> None:
    """It is refused over both loaders, not handed on as the least one that does."""
    before = fake.calls
    for wrong in (1 << 31, -(1 << 31) - 1):
        with pytest.raises(OverflowError):
            memory.map(DOMID, wrong, array("Q", [2]))
    assert fake.calls == before


def test_flags_need_a_library_that_takes_them(make_fake: MakeFake, binding: str) -> None:
    """They are not left out in silence where only the old call is there."""
    with ForeignMemory(binding=binding, library=make_fake("OLD").library) as memory:
        with pytest.raises(UnsupportedOperationError, match="xenforeignmemory_map2"):
            memory.map(DOMID, mmap.PROT_READ, array("Q", [2]), flags=mmap.MAP_POPULATE)
