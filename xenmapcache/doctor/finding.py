"""Finding: one thing that was looked at, and a check that cannot fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at. Immutable.

    Attributes:
        section: the part of the report that it belongs to.
        subject: what was looked at.
        state: a ``problem`` prevents mapping a live guest; a ``note`` does not.
        text: what was found.
        remedy: one line; empty if there is nothing to do.
        details: more of it for scripts.
    """

    section: str
    subject: str
    state: Literal["ok", "problem", "note"]
    text: str
    remedy: str = ""
    details: dict[str, object] = {}  # noqa: RUF012 - of a NamedTuple, and never changed


def guarded(
    section: str, subject: str, check: Callable[[], Iterable[Finding]]
) -> Iterator[Finding]:
    """Yield a check's findings. An error that it did not foresee is a finding, too."""
    try:
        yield from check()
    except Exception as error:  # the doctor looks at broken machines
        text = f"the check failed: {type(error).__name__}: {error}"
        yield Finding(section, subject, "problem", text, "report this line to xenmapcache")
