"""A guest's type is read out of xenstore, by its own protocol."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache.devicemodel import guest_type

HEADER = struct.Struct("<IIII")
READ, ERROR = 2, 16


class Store:
    """A xenstore with one entry, at the other end of a pair of sockets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = socket.socketpair()
        self.asked: list[bytes] = []
        self.replies: list[bytes] = []
        opened = theirs.detach()
        monkeypatch.setattr(os, "open", lambda path, flags: opened)
        self.thread: threading.Thread | None = None

    def reply(self, *chunks: bytes) -> None:
        """Answer the next question in pieces."""

        def serve() -> None:
            kind, _, _, length = HEADER.unpack(self.ours.recv(HEADER.size))
            assert kind == READ
            self.asked.append(self.ours.recv(length))
            for chunk in chunks:
                self.ours.send(chunk)
            if not chunks:
                self.ours.shutdown(socket.SHUT_RDWR)

        self.thread = threading.Thread(target=serve)
        self.thread.start()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(monkeypatch)
    yield store
    if store.thread is not None:
        store.thread.join()
    store.ours.close()


@pytest.mark.parametrize(("value", "kind"), [(b"hvm", "hvm"), (b"pvh", "pvh"), (b"stubdom", None)])
def test_what_the_toolstack_says(store: Store, value: bytes, kind: str | None) -> None:
    """Under /libxl; a type that this package does not know gives None."""
    store.reply(HEADER.pack(READ, 0, 0, len(value)), value)
    assert guest_type.guest_type(7) == kind
    assert store.asked == [b"/libxl/7/type\0"]


def test_an_answer_in_pieces(store: Store) -> None:
    """It is put together."""
    whole = HEADER.pack(READ, 0, 0, 3) + b"pvh"
    store.reply(*(whole[n : n + 1] for n in range(len(whole))))
    assert guest_type.guest_type(7) == "pvh"


def test_no_such_entry(store: Store) -> None:
    """A guest that xl has not made has no type."""
    store.reply(HEADER.pack(ERROR, 0, 0, 7), b"ENOENT\0")
    assert guest_type.guest_type(7) is None


def test_a_store_that_ends(store: Store) -> None:
    """It is as if it said nothing."""
    store.reply()
    assert guest_type.guest_type(7) is None


def test_a_store_that_never_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for without end."""
    monkeypatch.setattr(guest_type, "_TIMEOUT_S", 0.01)
    assert guest_type.guest_type(7) is None


def test_no_xenstore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Xen has no such device."""
    monkeypatch.setattr(guest_type, "DEVICE", tmp_path / "absent")
    assert guest_type.guest_type(7) is None
