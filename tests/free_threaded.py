"""Runs what threads matter to on CPython without a GIL: ``python -m tests.free_threaded [TESTS]``.

The interpreter is the one that ``XENMAPCACHE_FREE_THREADED`` names, or a python3.13t on the path,
or else one that is built here, once, from Debian's source package: no Debian has one ready. It is
kept in ``~/.cache/xenmapcache-free-threaded`` (``$XDG_CACHE_HOME``). With
``XENMAPCACHE_FREE_THREADED_PYTHON=3.14`` it is that release's.

Exit status: pytest's; 77 where no such interpreter can be had, after saying why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PYTHON: Final = os.environ.get("XENMAPCACHE_FREE_THREADED_PYTHON", "3.13")
SUITE: Final = {"3.13": "trixie", "3.14": "sid"}[PYTHON]
SOURCE: Final = f"python{PYTHON}"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NEEDED: Final = {
    "/usr/bin/apt-get": "apt",
    "/usr/bin/gcc": "gcc",
    "/usr/bin/make": "make",
    "/usr/bin/xz": "xz-utils",
    "/usr/include/zlib.h": "zlib1g-dev",
    "/usr/include/openssl/ssl.h": "libssl-dev",
    "/usr/include/x86_64-linux-gnu/ffi.h": "libffi-dev",
    str(KEYRING): "debian-archive-keyring",
}
"""What building takes, and in which of Debian's packages it is; ctypes needs libffi."""
OPTIONS: Final = ("--disable-gil", "--disable-test-modules", "OPT=-DNDEBUG -fwrapv -O1")
"""Without debug information and the last optimisations: half of the time."""
PACKAGES: Final = ("pytest>=7.2", "pytest-timeout", "pyelftools>=0.29")
TESTS: Final = (
    "tests/lifetime/test_threads.py",
    "tests/lifetime/test_processes.py",
    "tests/conformance/test_cache.py",
    *(f"tests/unit/test_{name}.py" for name in ("cache", "cache_room", "cache_values", "guest")),
    *(f"tests/unit/test_{name}.py" for name in ("lease", "lease_stale", "mapping", "mock")),
    *(f"tests/devicemodel/test_{name}.py" for name in ("invalidate", "requests", "serving")),
)
LEFT_OUT: Final = {
    "tests/unit/test_cache_room.py::test_a_view_that_is_kept_is_not_waited_for": (
        "without a GIL an object dies in the thread that made it, so the cache waits"
    ),
}
"""Tests that do not hold without a GIL, and why. They are printed at each run."""
SECONDS: Final = "20"
UNAVAILABLE: Final = 77
LOOK: Final = """
import platform, sys
from xenmapcache import MapCache, open_backend
from xenmapcache.binding.loader import get_loader
with open_backend("mock", memory="1M") as backend, MapCache(backend) as cache:
    cache.read(0, 1)
loader = type(get_loader()).__name__
gil = sys._is_gil_enabled()
print(f"CPython {platform.python_version()}, GIL {'on' if gil else 'off'}, C called by {loader}")
sys.exit(gil)
"""
"""Asks after all is imported: an extension module may bring the GIL back."""


class UnavailableError(Exception):
    """No such interpreter can be had here; the text says why."""


def run(*command: str | Path, folder: Path | None = None) -> str:
    """Run what prepares; UnavailableError with its last words if it fails."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-8:])
        text = " ".join(map(str, command))
        raise UnavailableError(f"status {done.returncode} of: {text}\n{last}")
    return done.stdout


def free_threaded(python: str | Path) -> bool:
    """Tell whether an interpreter starts, and without a GIL."""
    code = "import sys, venv; sys.exit(sys._is_gil_enabled())"
    command = [python, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def interpreter(cache: Path) -> Path:
    """Return an existing interpreter, or build one."""
    if named := os.environ.get("XENMAPCACHE_FREE_THREADED"):
        if not free_threaded(named):
            raise UnavailableError(f"{named} does not start without a GIL")
        return Path(named)
    found = shutil.which(f"{SOURCE}t")
    if found and free_threaded(found):
        return Path(found)
    built = cache / SOURCE
    if not free_threaded(built / "bin/python3"):
        shutil.rmtree(built, ignore_errors=True)  # half built
        build(built)
    return built / "bin/python3"


def build(prefix: Path) -> None:
    """Build it from the newest source package of its Debian."""
    if missing := sorted({name for path, name in NEEDED.items() if not Path(path).exists()}):
        install(missing)
    print(f"building {SOURCE} without a GIL, once, into {prefix}", flush=True)  # noqa: T201 - what it is for
    with tempfile.TemporaryDirectory() as work:
        tree = unpack(Path(work))
        run("./configure", "--quiet", f"--prefix={prefix}", *OPTIONS, folder=tree)
        run("make", "--silent", f"--jobs={os.cpu_count() or 1}", folder=tree)
        run("make", "--silent", "install", folder=tree)
    if not free_threaded(prefix / "bin/python3"):
        raise UnavailableError(f"what was built, {prefix}, does not start without a GIL")


def install(packages: Sequence[str]) -> None:
    """Install what building takes, where that is allowed."""
    command = ("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages)
    if os.geteuid() or not shutil.which("apt-get"):
        raise UnavailableError(f"packages are missing; as root: {' '.join(command)}")
    run("apt-get", "update", "--quiet")
    run("env", "DEBIAN_FRONTEND=noninteractive", *command)


def unpack(work: Path) -> Path:
    """Fetch the source package, whose signature apt checks, and unpack what is CPython's of it."""
    mirror = os.environ.get("XENMAPCACHE_LAB_MIRROR") or own_mirror()
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    # Of sid, a slow mirror has only an expired index.
    options = f"signed-by={KEYRING}" + (" check-valid-until=no" if SUITE == "sid" else "")
    (work / "sources.list").write_text(f"deb-src [{options}] {mirror} {SUITE} main\n")
    apt = ["apt-get", "--quiet", "--option=Dir::Etc::sourceparts=-"]
    apt.append("--option=APT::Sandbox::User=root")  # another user may not write here
    for key, name in {
        "Dir::State::lists": "lists",
        "Dir::State::status": "status",
        "Dir::Cache": "",
        "Dir::Etc::sourcelist": "sources.list",
    }.items():
        apt.append(f"--option={key}={work / name}")
    run(*apt, "update")
    run(*apt, "source", "--download-only", SOURCE, folder=work)
    (archive,) = work.glob("*.orig.tar.xz")
    tree = work / "tree"
    tree.mkdir()
    run("tar", "--extract", "--strip-components=1", f"--file={archive}", folder=tree)
    return tree


def own_mirror() -> str:
    """Return where this machine's Debian comes from."""
    form = ("--format", "$(REPO_URI)")
    uris = run("apt-get", "indextargets", *form, "Created-By: Packages", "Label: Debian").split()
    if not uris:
        raise UnavailableError(
            "apt knows no Debian to get sources from: set XENMAPCACHE_LAB_MIRROR"
        )
    return uris[0]


def prepare(python: Path, cache: Path) -> tuple[Path, Sequence[str]]:
    """Return the interpreter of an environment with what the tests need, and which those are.

    Without a cffi the tests that go through it are left out; with CI=true they would fail.
    """
    version = run(python, "-c", "import platform; print(platform.python_version())").strip()
    environment = cache / f"venv-{version}"
    inside = environment / "bin/python"
    if not free_threaded(inside):
        run(python, "-m", "venv", "--clear", environment)
    pip = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *PACKAGES)
    try:
        run(*pip, "--only-binary=cffi", "cffi>=1.15")
    except UnavailableError:
        print("there is no cffi for it: C is called through ctypes")  # noqa: T201 - what it is for
        return inside, ("-k", "not cffi")
    return inside, ()


def main() -> int:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "xenmapcache-free-threaded"
    try:
        python, chosen = prepare(interpreter(cache), cache)
    except UnavailableError as error:
        print(f"no CPython without a GIL can be had here: {error}")  # noqa: T201 - what it is for
        return UNAVAILABLE
    environment = {"XENMAPCACHE_THREADS": SECONDS, **os.environ, "PYTHONPATH": str(ROOT)}
    tests = sys.argv[1:] or TESTS
    for name, reason in LEFT_OUT.items():
        print(f"SKIPPED: {name}: {reason}", flush=True)  # noqa: T201 - what it is for
    left_out = [f"--deselect={name}" for name in LEFT_OUT]
    pytest = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *left_out, *chosen, *tests]
    for arguments in (["-c", LOOK], pytest):
        done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
