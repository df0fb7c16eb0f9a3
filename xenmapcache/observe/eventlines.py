"""Events as lines of JSON: one object per line, ASCII, as docs/recordings.md describes them.

The name of an event is its class's in lower case: ``lease_taken``. Its keys are the class's
attributes. The number of the stream, ``"stream"``, is left out if it is 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias, get_args

from ..events import Accessed, Event, Invalidated, RequestKey, RequestsHandled

VERSION: Final = 1
"""Of the form. A reader reads files of this version, and ignores keys that it does not know."""
MAX_LINE: Final = 1 << 16
"""How long a line may be, in bytes. What is written here is never longer."""
HEADER: Final = "recording"
"""The name of a line that begins a file, or a half of one."""
HEADER_START: Final = b'{"event":"recording",'

_MAX_TEXT, _MAX_READ_TEXT = 200, 4096
_MAX_TEXTS = 16
_MAX_NUMBERS = 2000
_MAX_COUNTS = 400
_LOW, _HIGH = -(1 << 63), 1 << 64

Value: TypeAlias = Any
"""What ``json.loads`` returns."""


class LineError(ValueError):
    """A line is damaged, or hostile; the message says what is wrong."""


class UnknownEventError(LineError):
    """A line is an event that this version does not know."""


class Header(NamedTuple):
    """The first line of a file, or of a half of it. Immutable.

    Attributes:
        version: of the form.
        number: of the half, from 0 on; the larger one is the later one.
        half: length of a half in bytes; None of a file that only grows.
        pid: of the process that was recorded; None of events from a log.
        source: what was recorded, for people.
        time: when the half began, on the events' clock, in ns; None if that has no wall clock.
        wall: what the wall clock showed then, in ns since the epoch. The events' clock does not
            follow changes of the wall clock.
        restated: how many lines follow that restate what was mapped and held then.
        left_out: how many such lines had no room.
    """

    version: int
    number: int
    half: int | None
    pid: int | None
    source: str
    time: int | None
    wall: int
    restated: int = 0
    left_out: int = 0


def text(value: str) -> str:
    """Return a text as JSON, cut if it is long."""
    from json import dumps  # the command starts faster without it

    if len(value) > _MAX_TEXT:
        value = f"{value[:_MAX_TEXT]}..."
    return dumps(value).replace("\x7f", r"\u007f")  # a terminal acts on it


def encode_header(header: Header) -> bytes:
    """Return the line of a header."""
    return _line(_HEADER_FORM, 0, header)


def encode(event: Event, stream: int = 0) -> bytes:
    """Return an event as a line, or a large batch as several lines.

    Args:
        event: to write.
        stream: the number of the stream in the recording.
    """
    form = _FORM_OF[type(event)]
    if isinstance(event, Accessed | RequestsHandled):
        counts: Iterator[tuple[Any, int]] = iter(event.counts.items())
        lines = []
        while part := dict(islice(counts, _MAX_COUNTS)):
            lines.append(_line(form, stream, (part,)))
        return b"".join(lines)
    line = _line(form, stream, event)
    if isinstance(event, Invalidated) and len(event.held) > _MAX_NUMBERS:
        return b'%b,"held_left_out":%d}\n' % (line[:-2], len(event.held) - _MAX_NUMBERS)
    return line


def template(event: Event, stream: int, numbers: Container[str]) -> bytes:
    """Return the line of an event, with ``%d`` for some of its numbers, to be formatted.

    Args:
        event: a batch or INVALIDATE is not allowed.
        stream: the number of the stream in the recording.
        numbers: the names of these attributes.
    """
    form = _FORM_OF[type(event)]
    texts = [
        "%d"
        if field.name in numbers
        else "null"
        if value is None
        else field.write(value).replace("%", "%%")
        for field, value in zip(form.fields, event, strict=True)
    ]
    number = f',"stream":{stream}' if stream else ""
    return (form.template % (number, *texts)).encode("ascii")


def _line(form: _Form, stream: int, values: Iterable[Value]) -> bytes:
    texts = [
        "null" if value is None else write(value)
        for write, value in zip(form.writers, values, strict=True)
    ]
    number = f',"stream":{stream}' if stream else ""
    return (form.template % (number, *texts)).encode("ascii")


class Decoded(NamedTuple):
    """What a line says. Immutable.

    Attributes:
        stream: the number of the stream in the recording.
        event: the event, or a header.
        left_out: how many numbers of an event the recorder has left out.
    """

    stream: int
    event: Event | Header
    left_out: int = 0


def decode(line: bytes) -> Decoded:
    """Return what a line says.

    Raises:
        UnknownEventError: it is an event that this version does not know.
        LineError: it is damaged.
    """
    from json import loads

    try:
        found = loads(line.decode())  # of bytes, json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise LineError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise LineError("a line must be an object")
    name = found.get("event")
    entry = _BY_NAME.get(name) if isinstance(name, str) else None
    if entry is None:
        raise UnknownEventError(f"unknown event {str(name)[:_MAX_TEXT]!r}")
    make, fields = entry.make, entry.fields
    values = []
    for field in fields:
        value = found.get(field.name, field.default)
        try:
            values.append(None if value is None and field.optional else field.read(value))
        except (TypeError, ValueError):
            raise LineError(f"{name}: wrong {field.name}") from None
    stream = found.get("stream", 0)
    left_out = found.get("held_left_out", 0)
    if not (_is_small(stream) and _is_small(left_out)):
        raise LineError(f"{name}: wrong stream or held_left_out")
    return Decoded(stream, make(*values), left_out)


def _is_small(value: Value) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


class _Field(NamedTuple):
    """An attribute of an event: how it is written and read."""

    name: str
    write: Callable[[Value], str]
    read: Callable[[Value], Value]
    optional: bool
    default: Value


class _Form(NamedTuple):
    """A kind of line."""

    make: Callable[..., Any]
    fields: tuple[_Field, ...]
    template: str
    writers: tuple[Callable[[Value], str], ...]


def _read_number(value: Value) -> int:
    if type(value) is not int or not _LOW <= value < _HIGH:
        raise ValueError
    return value


def _read_text(value: Value) -> str:
    if type(value) is not str or len(value) > _MAX_READ_TEXT:
        raise ValueError
    return value


def _read_truth(value: Value) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _read_list(value: Value, limit: int) -> list[Value]:
    if type(value) is not list or len(value) > limit:
        raise ValueError
    return value


def _read_request(value: Value) -> tuple[RequestKey, int]:
    kind, is_read, address, data, count = value
    key = RequestKey(
        _read_number(kind),
        _read_truth(is_read),
        _read_number(address),
        None if data is None else _read_number(data),
    )
    return key, _read_number(count)


def _write_truth(value: Value) -> str:
    return "true" if value else "false"


def _write_list(texts: Iterable[str]) -> str:
    return f"[{','.join(texts)}]"


def _write_requests(value: Mapping[RequestKey, int]) -> str:
    from json import dumps

    return dumps([[*key, count] for key, count in value.items()], separators=(",", ":"))


_FORMS: Final[dict[str, tuple[Callable[[Value], str], Callable[[Value], Value]]]] = {
    "int": (str, _read_number),
    "bool": (_write_truth, _read_truth),
    "str": (text, _read_text),
    "tuple[int, ...]": (
        lambda value: _write_list(map(str, value[:_MAX_NUMBERS])),
        lambda value: tuple(map(_read_number, _read_list(value, _MAX_NUMBERS))),
    ),
    "tuple[str, ...]": (
        lambda value: _write_list(map(text, value[-_MAX_TEXTS:])),
        lambda value: tuple(map(_read_text, _read_list(value, _MAX_TEXTS))),
    ),
    "Mapping[int, int]": (
        lambda value: _write_list(f"[{key},{count}]" for key, count in value.items()),
        lambda value: {
            _read_number(key): _read_number(count) for key, count in _read_list(value, _MAX_COUNTS)
        },
    ),
    "Mapping[RequestKey, int]": (
        _write_requests,
        lambda value: dict(map(_read_request, _read_list(value, _MAX_COUNTS))),
    ),
}
"""How values are written and read, by the annotation of the attribute."""


def _fields_of(kind: type[Event | Header]) -> tuple[_Field, ...]:
    fields = []
    for name, annotation in kind.__annotations__.items():
        # typing makes a ForwardRef of a text.
        form = str(getattr(annotation, "__forward_arg__", annotation))
        optional = form.endswith(" | None")
        write, read = _FORMS[form.removesuffix(" | None")]
        default = kind._field_defaults.get(name)
        # JSON has no tuples.
        default = list(default) if isinstance(default, tuple) else default
        fields.append(_Field(name, write, read, optional, default))
    return tuple(fields)


def name_of(kind: type[Event]) -> str:
    """Return the name of a class of events: ``lease_taken``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _form_of(kind: type[Event | Header], name: str) -> _Form:
    fields = _fields_of(kind)
    members = "".join(f',"{field.name}":%s' for field in fields)
    template = f'{{"event":"{name}"%s{members}}}\n'
    return _Form(kind, fields, template, tuple(field.write for field in fields))


_HEADER_FORM: Final = _form_of(Header, HEADER)
_FORM_OF: Final = {kind: _form_of(kind, name_of(kind)) for kind in get_args(Event)}
NAMES: Final = tuple(map(name_of, _FORM_OF))
"""The names of all events."""
_BY_NAME: Final = {HEADER: _HEADER_FORM, **dict(zip(NAMES, _FORM_OF.values(), strict=True))}
