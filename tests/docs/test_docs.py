"""Code in the documentation runs, links resolve, and what it names is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import xenmapcache
from tests.images.kdump_files import kdump, pages_of
from tests.images.writers import elf_core_of
from tests.images.xl_files import pages as saved_pages
from tests.images.xl_files import save
from tests.unit.test_layers import LAYERS
from xenmapcache import devicemodel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MAKEFILE = ROOT / "Makefile"
README = ROOT / "README.md"

NEEDS_XEN = "<!-- needs Xen -->"
RUN_BY_PYTEST = "<!-- run by pytest -->"
NEEDS_PACKAGE = re.compile(r"<!-- needs ([a-z]\w*) -->")
"""Before a block that imports an optional package: it runs where that is installed."""

FILES = {
    "guest.save": save(saved_pages(0, 1, 5)),
    "vmcore": elf_core_of([(0, 2)]),
    "vmcore.kdump": kdump(pages_of([(0, 2)]), vmcoreinfo=b"OSRELEASE=6.1.0\n"),
}
"""What the documentation's code opens without making it."""

FENCE = re.compile(r"(?P<ticks>`{3,})(?P<language>[\w{}-]*)")
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"#{1,6} +(?P<title>.+)")
FILE = re.compile(r"[\w/]+\.py")
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)")
DIRECTIVE = re.compile(r"^\.\. auto(?:class|exception|function|data):: (?P<name>\w+)", re.MULTILINE)

needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason=f"no folder {DOCS}")
needs_makefile = pytest.mark.skipif(not MAKEFILE.is_file(), reason=f"no file {MAKEFILE}")


class Block(NamedTuple):
    """A fenced block: its language, the line its code begins in, the code, the line before."""

    language: str
    line: int
    code: str
    before: str


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown text."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        start = number
        while number < len(lines) and lines[number].rstrip() != opening["ticks"]:
            number += 1
        assert number < len(lines), f"the block in line {start} has no end"
        code = "\n".join(lines[start:number])
        before = lines[start - 2].strip() if start > 1 else ""
        yield Block(opening["language"], start + 1, code, before)
        number += 1


def prose(text: str) -> str:
    """Return a Markdown text without its fenced blocks."""
    for block in blocks(text):
        text = text.replace(block.code, "", 1) if block.code else text
    return text


def python_blocks(text: str) -> list[Block]:
    return [block for block in blocks(text) if block.language == "python"]


def program(text: str) -> str:
    """Return a text's Python as one program, each line at the number it has in the text."""
    lines = [""] * len(text.splitlines())
    for block in python_blocks(text):
        package = NEEDS_PACKAGE.fullmatch(block.before)
        if package is not None and find_spec(package[1]) is None:
            continue
        if block.before not in (NEEDS_XEN, RUN_BY_PYTEST):
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


def run(code: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, under a name that tracebacks show."""
    file = folder / name
    file.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-W", "error", file],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def anchors(text: str) -> set[str]:
    """Return the anchors of a text's headings, as GitHub and MyST make them."""
    titles = (match["title"] for match in map(HEADING.fullmatch, prose(text).splitlines()) if match)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Return the relative links of a Markdown file that lead nowhere."""
    broken = []
    for match in LINK.finditer(INLINE.sub("", prose(path.read_text(encoding="utf-8")))):
        file, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", file):
            continue
        target = path.parent / file if file else path
        there = target.exists()
        if there and anchor and target.suffix == ".md":
            there = anchor in anchors(target.read_text(encoding="utf-8"))
        if not there:
            broken.append(match["target"])
    return broken


def named_targets(text: str) -> set[str]:
    """Return the targets of ``make`` that a text's code names."""
    named = set()
    for block in blocks(text):
        for line in block.code.splitlines():
            if line.startswith(("$ make ", "# make ")):
                named.update(TARGET.findall(line.partition("  #")[0]))
    for code in INLINE.findall(prose(text)):
        if code.startswith("make "):
            named.update(TARGET.findall(code))
    return named


def pages() -> list[Path]:
    """Return README and the documentation's pages, as far as they are here."""
    return [path for path in (README, *sorted(DOCS.glob("*.md"))) if path.is_file()]


def of_pages(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=lambda path: path.name)


WITH_PYTHON = [page for page in pages() if python_blocks(page.read_text(encoding="utf-8"))]


def test_the_pages_that_hold_code_are_found() -> None:
    """README is looked at, and with the folder docs at least its pages that teach."""
    taught = {"dom0.md", "device-models.md", "mock.md"}
    expected = {"README.md"} | (taught if DOCS.is_dir() else set())
    assert expected <= {page.name for page in WITH_PYTHON}


@of_pages(WITH_PYTHON)
def test_each_block_compiles(page: Path) -> None:
    """Every Python block is Python by itself, those that need a live Xen too."""
    for block in python_blocks(page.read_text(encoding="utf-8")):
        compile("\n" * (block.line - 1) + block.code, page.name, "exec")


@pytest.mark.slow
@of_pages(WITH_PYTHON)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """A page's Python blocks run in order, in one namespace, without warnings."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    done = run(program(page.read_text(encoding="utf-8")), page.name, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_docs
def test_the_test_files_that_are_shown_pass(tmp_path: Path) -> None:
    """A block that is a test file passes when pytest runs it as it stands."""
    shown = [
        block
        for page in WITH_PYTHON
        for block in python_blocks(page.read_text(encoding="utf-8"))
        if block.before == RUN_BY_PYTEST
    ]
    assert shown
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n", encoding="utf-8")
    for block in shown:
        (tmp_path / "test_shown.py").write_text(block.code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shown.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@needs_docs
@of_pages(pages())
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names an existing file, and a heading in it."""
    assert broken_links(page) == []


@needs_docs
def test_the_reference_has_every_public_name() -> None:
    """Each name that the package exports has its directive in the reference, and no other has."""
    found = set(DIRECTIVE.findall((DOCS / "api.md").read_text(encoding="utf-8")))
    assert found - {"xenmapcache"} == set(xenmapcache.__all__)


@needs_docs
def test_the_reference_has_the_device_models() -> None:
    """So has each name of the device-model kit."""
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^\.\. (?:autoclass|py:data):: ([\w.]+)", reference, re.MULTILINE)
    assert {f"xenmapcache.devicemodel.{name}" for name in devicemodel.__all__} <= {*described}


@needs_docs
def test_every_page_is_in_the_index() -> None:
    """A page that the tables of contents lack would not be found."""
    listed = [
        line
        for block in blocks((DOCS / "index.md").read_text(encoding="utf-8"))
        if block.language == "{toctree}"
        for line in block.code.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(listed) == sorted({path.stem for path in DOCS.glob("*.md")} - {"index"})


@needs_docs
def test_the_table_of_layers_is_the_real_one() -> None:
    """The design page has the rooms that the test of layers enforces, in the same order."""
    lines = (DOCS / "design.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| layer | rooms | job |") + 2
    rooms = [line.split("|")[2] for line in lines[start : lines.index("", start)]]
    assert [set(re.findall(r"`(\w+)(?:\.py|/)`", cell)) for cell in rooms] == LAYERS


@needs_docs
@of_pages(sorted(DOCS.glob("*.md")))
def test_files_that_are_named_exist(page: Path) -> None:
    """A page does not name a module that was moved or removed."""
    package = Path(xenmapcache.__file__).parent
    files = [f"xenmapcache/{path.relative_to(package)}" for path in package.rglob("*.py")]
    for place in (ROOT, package.parent):  # where the wheel is installed, the second one
        files += [path.name for path in place.glob("*.py")]
    for folder in ("tests", "examples", "docs"):
        files += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")]
    named = INLINE.findall(prose(page.read_text(encoding="utf-8")))
    missing = {
        name
        for name in named
        if FILE.fullmatch(name) and not any(f"/{file}".endswith(f"/{name}") for file in files)
    }
    assert not missing


@needs_docs
def test_the_picture_of_the_rooms_is_up_to_date(tmp_path: Path) -> None:
    """The picture is drawn from the imports, and a change of imports is noticed."""
    draw = [sys.executable, "docs/draw.py", "--check"]
    shutil.copytree(DOCS, tmp_path / "docs")
    package = tmp_path / "xenmapcache"
    shutil.copytree(Path(xenmapcache.__file__).parent, package)
    checks = []
    for change in ("", "from .cli import main\n"):
        with (package / "doctor_of_rooms.py").open("w") as file:
            file.write(change)
        if not change:
            (package / "doctor_of_rooms.py").unlink()
        checks.append(subprocess.run(draw, cwd=tmp_path, check=False).returncode)
    assert checks == [0, 1]


@needs_docs
def test_the_list_of_names_is_up_to_date(tmp_path: Path) -> None:
    """The list in the reference is made from the docstrings, and a stale one is noticed."""
    shutil.copytree(DOCS, tmp_path / "docs")
    check = [sys.executable, str(tmp_path / "docs" / "reference.py"), "--check"]
    fresh = subprocess.run(check, check=False).returncode
    page = tmp_path / "docs" / "api.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("A cache of mappings", "Another"), encoding="utf-8")
    assert (fresh, subprocess.run(check, check=False).returncode) == (0, 1)


@needs_makefile
@of_pages(pages())
def test_the_makefile_has_what_is_named(page: Path) -> None:
    """Each ``make TARGET`` in code is a target of the Makefile."""
    there = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named_targets(page.read_text(encoding="utf-8")) <= there


def test_the_readme_shows_what_the_demo_prints() -> None:
    """The demo's output in README is a part of what the demo prints; only ages may differ."""
    (shown,) = [
        block.code
        for block in blocks(README.read_text(encoding="utf-8"))
        if block.before == "<!-- output: make demo -->"
    ]
    command = [sys.executable, "-m", "xenmapcache", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    age = re.compile(r"\d\.\d{3} s")
    assert age.sub("0.000 s", shown) in age.sub("0.000 s", done.stdout)


# --- the checks themselves ---

SAMPLE = f"""# A `page`, with: marks

[there](other.md#two-words) [gone](gone.md) [no heading](other.md#none) [own](#a-page-with-marks)
`[code](code.md)` [far](https://example.org/x) and `make tea`, but do not make coffee

```python
value = 1
```

{NEEDS_XEN}
```python
raise SystemExit("this needs Xen")
```

```console
$ make toast     # make jam
```

```python
assert value == 2
```
"""


def test_blocks_share_a_namespace_and_keep_their_lines(tmp_path: Path) -> None:
    """A block sees the ones before it; what fails is named by its line; Xen's are left out."""
    done = run(program(SAMPLE), "sample.md", tmp_path)
    line = SAMPLE.splitlines().index("assert value == 2") + 1
    assert done.returncode == 1
    assert f'sample.md", line {line}' in done.stderr
    assert "AssertionError" in done.stderr
    assert run(program(SAMPLE.replace("== 2", "== 1")), "sample.md", tmp_path).returncode == 0


def test_broken_links_are_seen(tmp_path: Path) -> None:
    """A missing file and a missing heading are; other sites and code are not looked at."""
    (tmp_path / "other.md").write_text("# Other\n\n## Two words\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(SAMPLE, encoding="utf-8")
    assert broken_links(tmp_path / "page.md") == ["gone.md", "other.md#none"]


def test_named_targets_are_seen() -> None:
    """Those in code, and neither in comments nor in prose."""
    assert named_targets(SAMPLE) == {"tea", "toast"}
