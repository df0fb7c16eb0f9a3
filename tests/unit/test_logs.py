"""Log lines that cannot fail."""

from __future__ import annotations

import logging

import pytest

from xenmapcache.logs import safely


def test_logging_that_is_to_be_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As everywhere in logging, a program may ask not to hear of broken log handlers."""
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    safely(broken)
    assert capsys.readouterr().err == ""
