"""A comment that silences a checker names the rule and the reason."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenmapcache

ROOT = Path(__file__).parents[2]
PARTS = (Path(xenmapcache.__file__).parent, ROOT / "tests", ROOT / "examples")
SILENCER = re.compile(
    r"#\s*(?:(?P<linter>noqa)\b|(?P<types>type:\s*ignore)\b|(?P<coverage>pragma:\s*no\s+\w+))"
    r"(?P<codes>(?(linter):\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*|(?(types)\[[a-z, -]+\]|)))?",
)
REASON = re.compile(r"\s*(?:-|#)\s*\w.*")


def complaints(text: str) -> Iterator[str]:
    """Yield what is wrong with each comment of a text that silences a checker."""
    if SILENCER.search(text) is None:  # as in most files, and the tokenizer is slow
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        found = list(SILENCER.finditer(token.string))
        if any(each["codes"] is None for each in found):
            yield f"line {token.start[0]}: names no rule: {token.string}"
        elif found and not REASON.fullmatch(token.string, found[-1].end()):
            yield f"line {token.start[0]}: gives no reason: {token.string}"


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_is_silenced_has_a_reason(part: Path) -> None:
    """Each noqa and type: ignore names its rule; these and pragmas of coverage say why."""
    found = [
        f"{path}: {complaint}"
        for path in sorted(part.rglob("*.py"))
        for complaint in complaints(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("x = 1  # noqa", "no rule"),
        ("x = 1  # noqa: E501", "no reason"),
        ("x = 1  # noqa: E501, S101 - it is a table", ""),
        ("x = 1  # type: ignore # it is well", "no rule"),
        ("x = 1  # type: ignore[arg-type]", "no reason"),
        ("x = 1  # type: ignore[arg-type, misc] # on purpose", ""),
        ("x = 1  # type: ignore[misc] # noqa: SLF001", "no reason"),
        ("x = 1  # type: ignore[misc] # noqa: SLF001 - no other name", ""),
        ("x = 1  # pragma: no cover", "no reason"),
        ("x = 1  # pragma: no branch -", "no reason"),
        ("x = 1  # pragma: no cover - only in a dying interpreter", ""),
        ("x = '# noqa'  # an ordinary comment", ""),
    ],
)
def test_the_check_sees_what_lacks_one(line: str, wrong: str) -> None:
    """Codes and reasons that are missing are found, in comments only."""
    assert [wrong in complaint for complaint in complaints(line)] == ([True] if wrong else [])
