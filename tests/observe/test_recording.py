"""Recordings as lines: written, read again, damaged and hostile."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import get_args

import pytest

from tests.observe.recordings import EVENTS, START, released, taken
from xenmapcache.errors import WrongFormatError
from xenmapcache.events import Accessed, Event, Invalidated
from xenmapcache.files.regular import IrregularFileError
from xenmapcache.observe.eventlines import (
    MAX_LINE,
    VERSION,
    Header,
    LineError,
    UnknownEventError,
    decode,
    encode,
    encode_header,
    template,
)
from xenmapcache.observe.recording import read, write_recording

HEADER = encode_header(Header(VERSION, 0, None, None, "", START, START))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def write(path: Path, *lines: bytes) -> Path:
    """Write a plain recording."""
    path.write_bytes(b"".join((HEADER, *lines)))
    return path


def test_every_event_is_in_the_sample() -> None:
    """The other tests go through all kinds."""
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_one_line_of_json(event: Event) -> None:
    """It has a name and all attributes, is printable, and gives the same event again."""
    line = encode(event, 3)
    assert line.count(b"\n") == 1
    assert line[:-1].decode("ascii").isprintable()
    assert json.loads(line).keys() == {"event", "stream", *event._fields}
    assert decode(line) == (3, event, 0)
    assert b"stream" not in encode(event)


def test_templates_give_the_same_lines() -> None:
    """A sign for a number, in a text, stays as it is."""
    event = EVENTS[2]
    line = template(event, 2, ("time", "lease"))
    assert line % (START + 1000, 7) == encode(event, 2)
    bare = template(taken(), 0, ("time",))
    assert bare % (START + 1000) == encode(taken())


def test_what_is_long_is_cut_and_counted() -> None:
    """A line stays below the limit, whatever a name or a number of leases is."""
    long = taken(owner="\U0001f4a5" * 9999)._replace(origin=("\U0001f4a5" * 300,) * 50)
    line = encode(long)
    assert len(line) < MAX_LINE
    event = decode(line).event
    assert event == long._replace(
        owner="\U0001f4a5" * 200 + "...", origin=("\U0001f4a5" * 200 + "...",) * 16
    )
    held = tuple(range(1 << 63, (1 << 63) + 2500))
    line = encode(Invalidated(START, 1, None, held))
    assert len(line) < MAX_LINE
    assert decode(line) == (0, Invalidated(START, 1, None, held[:2000]), 500)
    batch = dict.fromkeys(range(1000), 1)
    lines = encode(Accessed(batch)).splitlines(keepends=True)
    events = [decode(line).event for line in lines]
    assert len(lines) == 3
    assert batch == {key: n for event in events for key, n in event.counts.items()}  # type: ignore[union-attr] # all are batches


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "no JSON"),
        (b"[" * 60_000, "no JSON"),
        (b'{"event":"cache_closed","time":' + b"9" * 9000 + b"}", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "must be an object"),
        (b'{"event":"cache_closed"}', None),
        (b'{"event":"cache_closed","time":1.5}', "wrong time"),
        (b'{"event":"cache_closed","time":true}', "wrong time"),
        (b'{"event":"cache_closed","time":18446744073709551616}', "wrong time"),
        (b'{"event":"cache_closed","time":1,"stream":-1}', "wrong stream"),
        (b'{"event":"cache_opened","time":1}', "wrong buckets"),
        (b'{"event":"cache_opened","time":1,"buckets":1,"source":5}', "wrong source"),
        (b'{"event":"invalidated","time":1,"number":1,"held":5}', "wrong held"),
        (b'{"event":"lease_released","time":1,"lease":1,"stale":1}', "wrong stale"),
        (b'{"event":"accessed","counts":[[1]]}', "wrong counts"),
        (b'{"event":"requests_handled","counts":[[1,2]]}', "wrong counts"),
        (b'{"event":"requests_handled","counts":[[0,true,1,null,4.5]]}', "wrong counts"),
        (
            b'{"event":"cache_opened","time":1,"buckets":1,"source":"' + b"x" * 5000 + b'"}',
            "wrong source",
        ),
    ],
)
def test_hostile_lines(line: bytes, reason: str | None) -> None:
    """Wrong types, numbers out of range, and deep or long things are errors that say what."""
    if reason is None:
        assert decode(line).event == (None,)
        return
    with pytest.raises(LineError, match=reason):
        decode(line)


@pytest.mark.parametrize("name", ["5", '"comet"', "null", "[]"])
def test_unknown_events(name: str) -> None:
    """They differ from damage: a later version may have written them."""
    with pytest.raises(UnknownEventError):
        decode(f'{{"event":{name}}}'.encode())


def test_what_was_written_is_read(path: Path) -> None:
    """In order, more than once, and in a file that is its owner's alone."""
    with write_recording(path, "a log") as recording:
        recording.write(EVENTS)
        recording.write(EVENTS, stream=1)
    assert path.stat().st_mode & 0o777 == 0o600
    found = read(path)
    assert list(found) == list(found) == EVENTS * 2
    assert [entry.stream for entry in found.entries()] == [0] * len(EVENTS) + [1] * len(EVENTS)
    assert found.headers[0].source == "a log"
    assert (found.lines, found.damaged, found.overwritten) == (2 * len(EVENTS) + 1, 0, False)


def test_large_files_are_written_and_read_in_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the parts are, nothing is lost between them."""
    monkeypatch.setattr("xenmapcache.observe.recording._BUFFER_BYTES", 100)
    monkeypatch.setattr("xenmapcache.observe.recording._CHUNK_BYTES", 7)
    with write_recording(path, "") as recording:
        recording.write(EVENTS)
    assert list(read(path)) == EVENTS


def test_a_failed_recording_leaves_nothing(path: Path) -> None:
    """The name appears when the file is complete."""
    with pytest.raises(RuntimeError), write_recording(path, "") as recording:
        recording.write(EVENTS)
        raise RuntimeError
    assert not path.exists()


def test_other_files_are_left_alone(path: Path, tmp_path: Path) -> None:
    """A recording and an empty file are replaced; a foreign file and a link are not."""
    other = tmp_path / "other"
    other.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(other)
    for name in (other, link):
        with pytest.raises(FileExistsError), write_recording(name, ""):
            pass
    assert other.read_text() == "precious"
    path.touch()
    for _ in range(2):
        with write_recording(path, "") as recording:
            recording.write(EVENTS)
    assert list(read(path)) == EVENTS


def test_damaged_lines_are_skipped_and_counted(path: Path) -> None:
    """A torn end, a line that is too long, an unknown event: the rest is read."""
    write(
        path,
        encode(taken()),
        b"x" * (MAX_LINE + 5) + b"\n",
        b"junk \x1b\n" * 6,
        b'{"event":"comet","time":1}\n',
        encode(released()),
        encode(taken())[:40],
    )
    found = read(path)
    assert list(found) == [taken(), released()]
    assert (found.damaged, found.unknown) == (8, 1)
    assert len(found.examples) == 5
    assert found.examples[0] == f"line 3: longer than {MAX_LINE} bytes: "
    assert "line 4: no JSON" in found.examples[1]


def test_a_long_line_without_an_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept in memory, wherever it lies."""
    monkeypatch.setattr("xenmapcache.observe.recording._CHUNK_BYTES", 1 << 16)
    write(path, b"\0" * 400_000)
    found = read(path)
    assert list(found) == []
    assert found.damaged == 1
    write(path, b"x" * 400_000 + b"\n", encode(taken()))
    assert list(found) == [taken()]


def test_damage_never_raises(path: Path) -> None:
    """Bytes are flipped, cut and doubled at random places."""
    chance = random.Random(5)
    whole = b"".join(map(encode, EVENTS))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 8)):
            place = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    del data[place : place + chance.randrange(50)]
                case _:
                    data[place:place] = data[chance.randrange(len(data)) :][:30]
        write(path, bytes(data))
        found = read(path)
        assert all(isinstance(event, get_args(Event)) for event in found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a recording"),
        (b"guest memory\n", "is not a recording"),
        (b'{"event":"recording",\n', "is not a recording"),
        (b'{"event":"recording","half":0}\n', "is not a recording"),
        (HEADER.replace(b'"version":1', b'"version":2'), "version 2"),
        (HEADER.replace(b'"half":null', b'"half":-5'), "is not a recording"),
    ],
)
def test_other_files_are_not_read(path: Path, data: bytes, message: str) -> None:
    """The message says how to write a recording, or what reads this one."""
    path.write_bytes(data)
    with pytest.raises(WrongFormatError, match=message):
        list(read(path))


def test_a_fifo_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(IrregularFileError):
        list(read(path))
