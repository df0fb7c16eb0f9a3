"""From a recording to a picture."""

from __future__ import annotations

from collections.abc import Iterator

from ..recording import Recording
from .model import Model, Picture


def picture_of(recording: Recording) -> Picture | None:
    """Read a recording, and return its picture; None if no event of it has a time.

    Raises:
        OSError: as :meth:`.Recording.entries` raises it.
        WrongFormatError: likewise.
    """
    entries = recording.entries()
    first = next(entries, None)
    model = Model(recording.headers[0].time if recording.headers else None)
    if first is not None:
        model.add([first])
        model.add(entries)
    if not model.timed:
        return None
    source = recording.headers[0].source if recording.headers else ""
    return model.finish(source, _notes(recording))


def _notes(recording: Recording) -> Iterator[str]:
    if recording.overwritten:
        yield "earlier events were overwritten; record with a larger limit"
    if recording.left_out:
        yield f"the recorder has left out {recording.left_out:,} things"
    if recording.unknown:
        yield f"{recording.unknown:,} events of unknown kinds are skipped"
    if recording.damaged:
        yield f"{recording.damaged:,} damaged lines are skipped"
        yield from recording.examples
