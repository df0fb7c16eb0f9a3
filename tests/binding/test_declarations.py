"""The C declarations: right by the real headers' word, read right, and generated from."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import build_ffi
from tests.fake_xen import compiler, missing, need
from xenmapcache.binding import ctypes_loader, devicemodel
from xenmapcache.binding.declarations import (
    CONTROL,
    DEVICE_MODEL,
    EVENT_CHANNEL,
    FOREIGN_MEMORY,
    LIBC,
    LIBRARIES,
    SCALARS,
    TOOL_CORE,
    TOOL_LOG,
    TYPES,
    Library,
    Prototype,
    prototypes,
)

Check = Callable[[Library, Path], str]


def run_gcc(arguments: list[str], source: str) -> str:
    """Compile C and return gcc's errors."""
    command = [compiler(), "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Werror", *arguments]
    done = subprocess.run(
        [*command, "-x", "c", "-"], input=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "error" in done.stderr
    return "" if done.returncode == 0 else done.stderr


def redeclared(library: Library, folder: Path) -> str:
    """Compile the real header, and then our prototypes again; return gcc's errors."""
    source = f"{library.includes}\n#include <stdint.h>\n{TYPES}{library.source}"
    if library.name == TOOL_LOG.name:  # what we call an int is an enum there
        source += '_Static_assert(sizeof(xentoollog_level) == sizeof(int), "level");\n'
    return run_gcc(["-fsyntax-only"], source)


def called(library: Library, folder: Path) -> str:
    """Compile cffi's calls of our prototypes against the real header; return gcc's errors."""
    need("cffi")
    import cffi

    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        missing(f"{include} has no Python.h (Debian: apt install python3-dev)")
    ffi = cffi.FFI()
    level = "typedef int... xentoollog_level;\n"  # of gcc's choice
    ffi.cdef((level if library.name == TOOL_LOG.name else "") + TYPES + library.source)
    xen = "" if library.name == LIBC.name else "#include <xentoollog.h>\n"
    ffi.set_source("_declared", xen + library.includes)
    target = folder / "declared.c"
    ffi.emit_c_code(str(target))
    return run_gcc(["-fsyntax-only", f"-I{include}"], target.read_text(encoding="utf-8"))


@pytest.fixture(params=[redeclared, called])
def check(request: pytest.FixtureRequest) -> Check:
    """Both ways to hold a declaration against a header."""
    chosen: Check = request.param
    return chosen


def need_header(library: Library) -> None:
    """Skip without the real header."""
    if run_gcc(["-fsyntax-only"], library.includes):
        missing(f"{library.name}'s header is not installed (Debian: apt install libxen-dev)")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_declarations_match_the_headers(library: Library, check: Check, tmp_path: Path) -> None:
    """Gcc accepts our prototypes next to the real ones, and calls through them."""
    need_header(library)
    assert check(library, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "right", "wrong"),
    [
        (
            FOREIGN_MEMORY,
            "const xen_pfn_t arr[], int err[]);",
            "int err[], const xen_pfn_t arr[]);",
        ),
        (FOREIGN_MEMORY, "int flags, size_t pages", "size_t pages"),
        (
            CONTROL,
            "const xen_pfn_t *arr,\n                          int *err",
            "int *arr, int *err",
        ),
        (DEVICE_MODEL, "int handle_bufioreq,", ""),
        (DEVICE_MODEL, "xen_pfn_t *ioreq_gfn", "int *ioreq_gfn"),
        (
            DEVICE_MODEL,
            "struct xen_dm_op_modified_memory_extent extents[]",
            "xen_pfn_t extents[]",
        ),
        (EVENT_CHANNEL, "uint32_t domid,\n", "\n"),
        (EVENT_CHANNEL, "xenevtchn_fd(xenevtchn_handle *xce)", "xenevtchn_fd(int xce)"),
        (TOOL_CORE, "domid_t domid", "domid_t *domid"),
        (TOOL_LOG, "FILE *f, xentoollog_level", "int *f, xentoollog_level"),
        (LIBC, "const char *mode", "const int *mode"),
    ],
)
def test_a_wrong_declaration_is_found(
    library: Library, check: Check, right: str, wrong: str, tmp_path: Path
) -> None:
    """Swapped, missing and mistyped parameters do not compile."""
    need_header(library)
    assert right in library.source
    assert check(library._replace(source=library.source.replace(right, wrong)), tmp_path) != ""


@pytest.mark.parametrize(
    ("library", "right", "wrong"),
    [
        (FOREIGN_MEMORY, "uint32_t dom,", "uint64_t dom,"),
        (FOREIGN_MEMORY, "domid_t domid", "uint32_t domid"),
        (DEVICE_MODEL, "typedef uint16_t ioservid_t", "typedef uint32_t ioservid_t"),
        (DEVICE_MODEL, "uint8_t intx", "uint16_t intx"),
        (DEVICE_MODEL, "uint64_t first_pfn", "uint32_t first_pfn"),
        (DEVICE_MODEL, "uint32_t msi_data", "uint64_t msi_data"),
        (EVENT_CHANNEL, "evtchn_port_t remote_port", "domid_t remote_port"),
        (EVENT_CHANNEL, "int xenevtchn_port_or_error_t", "long xenevtchn_port_or_error_t"),
        (TOOL_CORE, "domid_t domid", "uint32_t domid"),
    ],
)
def test_a_wrong_width_is_found(library: Library, right: str, wrong: str, tmp_path: Path) -> None:
    """A number of the wrong width, which calls would convert silently, is a conflicting type."""
    need_header(library)
    assert right in library.source
    source = library.source.replace(right, wrong)
    errors = redeclared(library._replace(source=source), tmp_path)
    assert "conflicting types for" in errors


def test_extent_of_written_pages() -> None:
    """What modified_memory_bulk is given has the size and the fields of the header's structure."""
    need_header(DEVICE_MODEL)
    source = f"""{DEVICE_MODEL.includes}
typedef struct xen_dm_op_modified_memory_extent extent;
_Static_assert(sizeof(extent) == {devicemodel._EXTENT.size}, "size");
_Static_assert(__builtin_offsetof(extent, nr) == 0 && sizeof(((extent *)0)->nr) == 4, "nr");
_Static_assert(__builtin_offsetof(extent, pad) == 4, "pad");
_Static_assert(__builtin_offsetof(extent, first_pfn) == 8, "first_pfn");
"""
    assert run_gcc(["-fsyntax-only"], source) == ""
    count, first = (7).to_bytes(4, sys.byteorder), (9).to_bytes(8, sys.byteorder)
    assert devicemodel._EXTENT.pack(7, 0, 9) == count + bytes(4) + first


# --- the parser -------------------------------------------------------------------------


def parse(source: str) -> dict[str, Prototype]:
    return dict(prototypes(LIBC._replace(source=source)))


def test_parser_reads_what_c_means() -> None:
    """Pointers, arrays, const, comments and line ends are understood; typedefs are skipped."""
    source = """
    typedef struct thing thing; /* not this: int no(int x); */
    void *one(const thing *a, int b[],
              unsigned long c);
    unsigned long two(size_t n); thing *three(void **p); void four(domid_t d);
    """
    assert list(parse(source).values()) == [
        Prototype("one", "*", ("*", "*", "unsigned long")),
        Prototype("two", "unsigned long", ("size_t",)),
        Prototype("three", "*", ("*",)),
        Prototype("four", "void", ("domid_t",)),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "int f(int x, ...);",
        "int f(void);",
        "int f();",
        "int f(int);",
        "int f(unsigned);",
        "int f(unsigned long);",
        "int f(int (*callback)(int));",
        "int f(double x);",
        "int f(struct thing x);",
        "double f(int x);",
        "struct thing f(int x);",
        "static int f(int x);",
        "struct thing { int x; };",
        "enum { one, two };",
        "int x;",
        "#define F 1\nint f(int x);",
        "int f(int x) { return x; }",
    ],
)
def test_parser_refuses_what_it_does_not_understand(source: str) -> None:
    """Anything else is an error when the library is opened, and not a wrong call later."""
    with pytest.raises(ValueError, match=re.escape(f"{LIBC.name}: cannot read")):
        parse(source)


def test_every_type_is_known_to_ctypes() -> None:
    """The parser lets just those types through that the ctypes loader can pass."""
    assert ctypes_loader._TYPES.keys() == SCALARS | {"*", "void"}


# --- build_ffi.py -------------------------------------------------------------------------


@pytest.fixture
def generator() -> None:
    """The generator runs cffi, over the package's source."""
    need("cffi")
    if not build_ffi.BINDING.is_dir():
        pytest.skip("the package's source is not here: an installed wheel is tested")


@pytest.mark.usefixtures("generator")
def test_committed_module_is_up_to_date() -> None:
    """--check passes on the file that is in the tree."""
    command = [sys.executable, build_ffi.__file__, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("generator")
def test_generator_is_deterministic(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two runs write the same bytes, and nothing else."""
    files = [tmp_path / "one.py", tmp_path / "two.py"]
    for file in files:
        assert build_ffi.main(["--output", str(file)]) == 0
    one, two = (file.read_bytes() for file in files)
    assert one == two
    assert one == (build_ffi.BINDING / "_cffi.py").read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("generator")
@pytest.mark.parametrize("drift", ["changed", "absent"])
def test_drift_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str], drift: str) -> None:
    """--check on any other file exits with 1, shows the difference, and changes nothing."""
    target = tmp_path / "_cffi.py"
    if drift == "changed":
        assert build_ffi.main(["--output", str(target)]) == 0
        target.write_text(target.read_text(encoding="utf-8").replace("munmap", "unmap"))
    before = target.read_bytes() if target.exists() else None
    assert build_ffi.main(["--check", "--output", str(target)]) == 1
    shown = capfd.readouterr().err
    assert re.search(r"^\+    _globals = .*munmap", shown, re.MULTILINE)
    assert "is not up to date: run python build_ffi.py" in shown
    assert (target.read_bytes() if target.exists() else None) == before
