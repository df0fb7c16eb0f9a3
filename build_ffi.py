"""Generate the cffi module from the C declarations, or check that it is up to date.

    python build_ffi.py           writes xenmapcache/binding/_cffi.py
    python build_ffi.py --check   exits with 1 if that file is not what would be written

The result is an out-of-line, ABI-mode module: it needs cffi to be made and to be
imported, but neither a compiler nor Xen.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
BINDING = ROOT / "xenmapcache" / "binding"


def load_declarations() -> ModuleType:
    """Import declarations.py by its path: the package itself may not be importable yet."""
    spec = importlib.util.spec_from_file_location("declarations", BINDING / "declarations.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {BINDING / 'declarations.py'}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate() -> str:
    """Return the text of the cffi module."""
    import cffi

    declarations = load_declarations()
    ffi = cffi.FFI()
    ffi.set_source("xenmapcache.binding._cffi", None)
    ffi.cdef(declarations.OPAQUE + declarations.TYPES)
    for library in declarations.LIBRARIES:
        ffi.cdef(library.source)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "_cffi.py"
        with contextlib.redirect_stdout(io.StringIO()):  # cffi announces its temporary file
            ffi.emit_python_code(str(target))
        return target.read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write or check the generated module and return the exit status."""
    parser = argparse.ArgumentParser(description="Generate the cffi module of the binding.")
    parser.add_argument("--check", action="store_true", help="only compare, exit with 1 on drift")
    parser.add_argument(
        "--output", type=Path, default=BINDING / "_cffi.py", help="the file (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    output: Path = options.output
    wanted = generate()
    present = output.read_text(encoding="utf-8") if output.exists() else ""
    if not options.check:
        output.write_text(wanted, encoding="utf-8")
        return 0
    if wanted == present:
        return 0
    sys.stderr.writelines(
        difflib.unified_diff(
            present.splitlines(True), wanted.splitlines(True), str(output), "generated now"
        )
    )
    sys.stderr.write(f"\n{output.name} is not up to date: run python build_ffi.py and commit it\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
