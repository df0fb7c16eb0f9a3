"""The picture that examples/framebuffer.py writes, read back."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/framebuffer.py"

pytestmark = pytest.mark.slow


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def read_png(data: bytes) -> tuple[int, int, bytes]:
    """Return width, height and pixels of an RGB picture whose rows have no filter."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    position = 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = content
        position += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    lines = zlib.decompress(chunks[b"IDAT"])
    rows = [lines[start : start + 1 + 3 * width] for start in range(0, len(lines), 1 + 3 * width)]
    assert len(rows) == height
    assert {row[0] for row in rows} == {0}
    return width, height, b"".join(row[1:] for row in rows)


def test_the_picture_has_the_pixels_that_the_guest_drew(tmp_path: Path) -> None:
    """A PNG of the last picture: red, green and blue in their order, stride left out."""
    file = tmp_path / "screen.png"
    done = run("-o", file)
    assert done.returncode == 0, done.stderr
    width, height, pixels = read_png(file.read_bytes())
    assert (width, height) == (320, 200)
    middle, bottom = (100 * width + 160) * 3, 199 * width * 3
    assert tuple(pixels[middle : middle + 3]) == (255, 224, 64)
    assert tuple(pixels[bottom : bottom + 3]) == (0, 16, 99)
    assert f"{zlib.crc32(pixels):08x}" in done.stdout.splitlines()[-4]


def test_a_real_guest_wants_a_place() -> None:
    """With --domid alone the example says what it needs."""
    done = run("--domid", 3)
    assert done.returncode == 2
    assert "--domid wants --address, --width, --height and --output" in done.stderr
