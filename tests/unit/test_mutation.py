"""The mutants that are kept, and the runner that breaks the package by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.__main__ import main
from tests.mutation.mutant import Mutant
from tests.mutation.runner import PACKAGE, TESTS

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str]]

ERRORS = """
file = "xenmapcache/errors.py"
tests = ["tests/unit/test_cache.py::test_errors_survive_pickling"]
"""
COMMENT = """
[comment]
harm = "None."
old = "    errno: int\\n"
new = "    errno: int  # positive\\n"
"""
BROKEN = """
[broken]
harm = "Facts are missing."
old = "self.domid = domid"
new = "pass"
"""


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs mutants of one file; gives the exit status and what was printed."""

    def run(text: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "mutants.toml").write_text(text)
        status = main(["--mutants", str(tmp_path), *arguments])
        return status, " ".join(capsys.readouterr().out.split())

    return run


def test_the_mutants_that_are_kept_apply() -> None:
    """Each one's old text is there once, its new one is Python, its tests are in their files."""
    mutants = Mutant.load()
    assert len(mutants) > 100
    for mutant in mutants:
        mutant.check(PACKAGE, TESTS)
        for target in mutant.tests:
            file, _, name = target.partition("::")
            if name:
                text = (TESTS.parent / file).read_text(encoding="utf-8")
                assert f"def {name.partition('[')[0]}(" in text, mutant
        assert mutant.harm.endswith(".")


def test_killed_and_survived(run: Run) -> None:
    """A break that a test notices is killed; a comment survives, is told of: status 1."""
    status, output = run(ERRORS + COMMENT + BROKEN)
    assert status == 1
    assert "comment: survives None." in output
    assert "broken fails unit/test_cache.py::test_errors_survive_pickling" in output
    assert "1 of 2 killed" in output


def test_what_ends_the_process_is_killed(run: Run) -> None:
    """A crash and a hang count, and a crash says which signal, and which test it was."""
    text = ERRORS + BROKEN.replace("self.domid = domid", "(self.errno)}{hint}")
    status, output = run(text.replace("pass", "(os.kill(os.getpid(), 11))}{hint}"))
    assert status == 0
    assert "broken crashes (SIGSEGV) unit/test_cache.py::test_errors_survive_pickling" in output
    status, output = run(text.replace("pass", "([None for _ in iter(int, 1)])}"), "--grace=1")
    assert status == 0
    assert "broken hangs " in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self.domid = domid": "self.domid = 7"}, "errors.py has its old text 0 times"),
        ({"self.domid = domid": "self.errno = errno"}, "errors.py has its old text 2 times"),
        ({'"pass"': '"pass pass"'}, "no longer applies: invalid syntax"),
        ({"errors.py": "mistakes.py"}, "no longer applies: there is no xenmapcache/mistakes.py"),
        ({"test_cache.py": "test_cash.py"}, "there is no tests/unit/test_cash.py"),
    ],
)
def test_mutants_that_fit_no_more(run: Run, changes: dict[str, str], message: str) -> None:
    """Moved code or tests are told of, with status 1, and nothing is run."""
    text = ERRORS + BROKEN
    for old, new in changes.items():
        text = text.replace(old, new)
    status, output = run(text)
    assert status == 1
    assert message in output
    assert "0 of 1 killed" in output


def test_tests_that_prove_nothing(run: Run) -> None:
    """A test that is not there, or cannot be collected under a mutant, is not taken for a kill."""
    status, output = run(ERRORS.replace("pickling", "pickled") + BROKEN)
    assert status == 1
    assert "The tests do not pass where nothing is broken:" in output
    assert "not found" in output
    import_error = BROKEN.replace("self.domid = domid", "class CacheFullError(XenMapCacheError):")
    status, output = run(ERRORS + import_error.replace("pass", "class CacheFull(OSError):"))
    assert status == 1
    assert "cannot import name 'CacheFullError'" in output
    assert "cannot be judged" in output


def test_mutants_by_name(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """They are listed with what they break; an unknown name is refused."""
    status, output = run(ERRORS + COMMENT + BROKEN, "--list", "broken")
    assert status == 0
    assert "broken errors.py Facts are missing." in output
    assert "None." not in output
    with pytest.raises(SystemExit):
        run(ERRORS + COMMENT, "nameless")
    assert "there is no mutant 'nameless': see --list" in capsys.readouterr().err


def test_a_sample_depends_on_its_seed(run: Run) -> None:
    """Over some seeds each mutant is chosen; one seed always chooses the same one."""
    first, *others = [
        run(ERRORS + COMMENT + BROKEN, "--list", "--sample=1", f"--seed={seed}")[1]
        for seed in (0, 0, 1, 2, 3, 4, 5, 6, 7)
    ]
    assert others[0] == first
    assert len({*others}) == 2
    assert all(("Facts are missing." in text) != ("None." in text) for text in others)
