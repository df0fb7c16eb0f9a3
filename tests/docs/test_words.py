"""Plain English: the worst words are in no document, docstring, comment, message or help text."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import pytest_xenmapcache
import xenmapcache

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = Path(xenmapcache.__file__).parent
"""Not always in ROOT: CI tests the installed wheel."""

WORDS: Final = {
    r"\babsurd": "implausible, contradicts",
    r"\banew\b|\bonce more\b": "again",
    r"\b(?:some|any)body\b|\bwho(?:m|so)?ever\b": "what acts: Xen, a thread, your handler",
    r"\bbehind\b": "after, beyond, backing",
    r"\bbeside\b": "besides, next to, compared with",
    r"\bdeal(?:s|t)? with\b|\bsees? to\b": "handle, ensure",
    r"\bfor good\b(?! reason)": "permanently",
    r"(?<!there\s)\b(?:is|are) (?-i:no(?:ne)?)\b(?! (?:longer|more|less)\b)": "what must be",
    r"\blets? (?:\w+ )?go\b": "release, drop",
    r"\b(?:that|which|who) lies?\b(?! (?:in|on|at|within|between|beyond)\b)": "corrupt",
    r"\bmeanwhile\b": "while the guest runs, or what else happens",
    r"\bmend(?:s|ed|ing)?\b": "fix, repair",
    r"\bno more\b(?! than\b)": "no longer, no further",
    r"\bnone such\b|\bsuch as (?:can|could|may)\b|\bthere (?:is|are) none such\b": "what must be",
    r"\bof another making\b": "created by other code",
    r"\bover an? (?:invalidation|eviction|fork)\b": "across",
    r"\bpasse[sd] over\b": "skip",
    r"\b(?:so many|so long|as many as)\b": "N, up to N, while",
    r"\b(?:the|its|of) books\b": "the accounting",
    r"\bwhat is there\b|\b(?:that|which) (?:is|are) there\b": "present, exists",
}
"""Pattern, and what to write. The reasons are in CONTRIBUTING.md and the glossary."""

ALLOWED: Final = {
    "tests/docs/test_words.py": "it names the words",
}
"""Files in which a word may stand, and why."""

TO_DO: Final[dict[str, int]] = {}
"""Folders and files that still have such words, and how many at most. The numbers only shrink."""

PATTERNS: Final = {
    # Because a line may end inside a phrase, a blank of a pattern matches its end too.
    re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE): better
    for pattern, better in WORDS.items()
}
ANY: Final = re.compile("|".join(each.pattern for each in PATTERNS), re.IGNORECASE)
"""Most texts have none, and one search for all says so in less time than one for each."""
GOOD: Final = re.compile(r"\b(?:lea(?:ve|ves|ving)|left)(?:\s+\w+){0,3}\s+behind\b", re.IGNORECASE)
"""Phrases that are plain English, although they have a word of the list."""

HASH_COMMENTS: Final = {"Makefile", "run", "nightly", "release-check"}
C_COMMENT: Final = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
FENCE: Final = re.compile(r"^(`{3,}).*?^\1$", re.DOTALL | re.MULTILINE)
TOML: Final = re.compile(r'^(?:harm|description) = "(.*)"|^\s*#(.*)', re.MULTILINE)
CODE: Final = re.compile(r"`[^`\n]+`")


class Text(NamedTuple):
    """A text for people, and the line in which it begins."""

    line: int
    text: str


class Found(NamedTuple):
    """A word that is not plain English."""

    place: str
    line: int
    word: str
    better: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.word!r}: write {self.better}"


def blank(match: re.Match[str]) -> str:
    """Return the lines of a match without what is in them."""
    return "\n" * match[0].count("\n")


def hash_comments(text: str) -> Iterator[Text]:
    """Yield each run of comment lines, and each comment at the end of a line, as one text."""
    first, lines = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        own, _, comment = line.partition("#")
        if lines and (own.strip() or not comment):
            yield Text(first, "\n".join(lines))
            lines = []
        if comment:
            first = first if lines else number
            lines.append(comment)
    if lines:
        yield Text(first, "\n".join(lines))


def python_comments(text: str) -> Iterator[Text]:
    """Yield the comments of a Python file; those that follow each other as one text."""
    first, last, lines = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != last + 1:
            yield Text(first, "\n".join(lines))
            lines = []
        last = token.start[0]
        first = first if lines else last
        lines.append(token.string.lstrip("#: "))
    if lines:
        yield Text(first, "\n".join(lines))


def texts(path: Path) -> Iterator[Text]:
    """Yield what a person reads in a file: prose, comments, docstrings, messages and help."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield Text(1, CODE.sub("`code`", FENCE.sub(blank, text)))
    elif path.suffix == ".py":
        # The tokenizer is slow, and what comes after a "#" has mostly no such word.
        after = (line.partition("#")[2].lstrip("#: ") for line in text.splitlines())
        if ANY.search("\n".join(after)):
            yield from python_comments(text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield Text(node.lineno, node.value)
    elif path.suffix == ".c":
        for match in C_COMMENT.finditer(text):
            yield Text(text.count("\n", 0, match.start()) + 1, match[0])
    elif path.suffix == ".toml":  # but not the code that mutants quote
        for match in TOML.finditer(text):
            yield Text(text.count("\n", 0, match.start()) + 1, match[0])
    elif path.name in HASH_COMMENTS:
        yield from hash_comments(text)
    else:
        yield Text(1, text)


def words_in(text: Text, place: str) -> Iterator[Found]:
    """Yield the words of a text that are not plain English."""
    text = text._replace(text=GOOD.sub(lambda match: match[0][:-6] + "*", text.text))
    if ANY.search(text.text) is None:
        return
    for pattern, better in PATTERNS.items():
        for match in pattern.finditer(text.text):
            line = text.line + text.text.count("\n", 0, match.start())
            yield Found(place, line, " ".join(match[0].split()), better)


def files() -> Iterator[tuple[str, Path]]:
    """Yield each file that people read, with its path in the repository."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "_cffi.py":  # generated
            yield f"xenmapcache/{path.relative_to(PACKAGE)}", path
    yield "pytest_xenmapcache.py", Path(pytest_xenmapcache.__file__)
    patterns = ("*.md", "pyproject.toml", "Makefile", "build_ffi.py", ".pre-commit-config.yaml")
    trees = (".ci/*", "docs/*.md", "docs/*.py", "examples/**/*.py", "examples/**/*.md")
    tests = ("tests/**/*.py", "tests/**/*.c", "tests/**/*.toml")
    for pattern in (*patterns, *trees, *tests):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                yield str(path.relative_to(ROOT)), path


def part_of(place: str) -> str:
    """Return the entry of TO_DO that a file belongs to: its own, its folder's, or none."""
    parents = [place, *(str(parent) for parent in Path(place).parents)]
    return next((parent for parent in parents if parent in TO_DO), place)


@pytest.mark.slow
def test_the_worst_words_are_gone() -> None:
    """No file has a word of the list, but for what is still to do."""
    found = [
        word
        for place, path in files()
        if place not in ALLOWED
        for text in texts(path)
        for word in words_in(text, place)
    ]
    counts = Counter(part_of(word.place) for word in found)
    too_many = {part for part, count in counts.items() if count > TO_DO.get(part, 0)}
    listed = [str(word) for word in found if part_of(word.place) in too_many]
    now = {part: counts[part] for part in sorted(too_many)}
    assert not listed, "\n".join([*listed, f"words now, by entry of TO_DO: {now}"])


def test_every_allowed_place_exists() -> None:
    """A file or folder that was moved does not leave its permission behind."""
    for place in (*ALLOWED, *TO_DO):
        folder = PACKAGE.parent if place.startswith("xenmapcache") else ROOT
        if place.startswith(("xenmapcache", "tests")):  # CI's copy has no other folders
            assert (folder / place).exists(), place


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The page behind it", "behind"),
        ("Made\nanew", "anew"),
        ("12 is no\nnumber", "is no"),
        ("It is none of these", "is none"),
        ("Whoever waits", "Whoever"),
        ("Take so many events", "so many"),
        ("Meanwhile, it waits", "Meanwhile"),
        ("A file that lies", "that lies"),
        ("It is no longer there", ""),
        ("A page that lies in a hole", ""),
        ("There are besides these", ""),
        ("It takes no more than 3", ""),
        ("It leaves no file behind", ""),
        ("if it is None", ""),
    ],
)
def test_the_check_sees_words(text: str, word: str) -> None:
    """A word of the list is found, over the end of a line too; its good neighbours are not."""
    assert [found.word for found in words_in(Text(1, text), "x")] == ([word] if word else [])


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("x.md", "one\n```\nbehind\n```\n`behind`\nis behind\n", [6]),
        ("x.py", '"""One.\n\nbehind"""\n\nx = 1  # behind\nbehind = f"{x} behind"\n', [5, 3, 6]),
        ("x.py", "# made so\n# many times\n\n# so\n\n# many\n", [1]),
        ("x.c", "int behind; /* one\n behind */\n// behind\n", [2, 3]),
        ("Makefile", "x:  ## behind\n\tbehind\n# so\n# many\n", [1, 3]),
        ("x.toml", '# behind\nharm = "It is behind."\nold = "behind = 1"\n', [1, 2]),
    ],
)
def test_the_check_reads_what_people_read(
    tmp_path: Path, name: str, content: str, lines: list[int]
) -> None:
    """Prose, comments, docstrings and messages are read, but not code."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = [word.line for text in texts(path) for word in words_in(text, name)]
    assert found == lines
