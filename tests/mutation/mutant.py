"""A mutant: one place of the package that is broken on purpose, as the TOML files have it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple, Self

MUTANTS = Path(__file__).parent / "mutants"


class StaleMutantError(Exception):
    """A mutant does not fit the package or the tests any more."""


class Mutant(NamedTuple):
    """A break, and who has to notice it.

    Attributes:
        name: its own.
        harm: what is broken, and what a user would suffer.
        file: of the package, as ``xenmapcache/cache/mapcache.py``.
        old: a piece of it, that occurs once.
        new: what comes in its place.
        tests: files or node ids, in the order in which they are run.
    """

    name: str
    harm: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path = MUTANTS) -> list[Self]:
        """Read all files of a folder.

        Each begins with ``file``, and ``tests`` for those mutants that name none of their
        own; then comes a table for each mutant, whose title is the mutant's name.
        """
        mutants: dict[str, Self] = {}
        for path in sorted(folder.glob("*.toml")):
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            file, tests = content.pop("file"), content.pop("tests")
            for name, fields in content.items():
                if name in mutants:
                    raise ValueError(f"{path}: there are two mutants {name!r}")
                mutants[name] = cls(name, **{"file": file, "tests": tests, **fields})
        return [mutant._replace(tests=tuple(mutant.tests)) for mutant in mutants.values()]

    def applied(self, text: str) -> str:
        """Return the text of its file with the break in it.

        Raises:
            StaleMutantError: the old text is not there exactly once, or the new one is not Python.
        """
        count = text.count(self.old)
        if count != 1:
            raise StaleMutantError(f"no longer applies: {self.file} has its old text {count} times")
        broken = text.replace(self.old, self.new)
        try:
            compile(broken, self.file, "exec")
        except SyntaxError as error:
            raise StaleMutantError(f"no longer applies: {error}") from None
        return broken

    def check(self, package: Path, tests: Path) -> None:
        """Look whether it can be applied, and its tests are there.

        Args:
            package: the folder ``xenmapcache``.
            tests: the folder ``tests``.

        Raises:
            StaleMutantError: it cannot, or they are not.
        """
        for target in self.tests:
            file = target.partition("::")[0]
            if not (tests.parent / file).is_file():
                raise StaleMutantError(f"there is no {file}")
        path = package.parent / self.file
        if not path.is_file():
            raise StaleMutantError(f"no longer applies: there is no {self.file}")
        self.applied(path.read_text(encoding="utf-8"))
