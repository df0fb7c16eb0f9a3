"""``info``, ``read``, ``find``, ``strings`` and ``diff`` over files, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.process import MODULE, environment, on_terminal
from tests.unit.test_source import lime
from xenmapcache import (
    Backend,
    MapCache,
    MockHypervisor,
    XenCallError,
    open_backend,
    write_coredump,
)
from xenmapcache.address import PAGE_SIZE, GiB, MiB
from xenmapcache.backends.mock import MockBackend
from xenmapcache.cli import find, main, sources
from xenmapcache.mapping import Mapping

Run = Callable[..., str]

LOW, HIGH = 0x3000, 0x5000
"""The hole in the guest's memory of 0x7000 bytes."""


@pytest.fixture
def guest(tmp_path: Path) -> str:
    """A LiME file: 0 to LOW, and HIGH to 0x7000, with a text next to the hole."""
    low = bytearray(LOW)
    low[0x10:0x16] = b"needle"
    low[0x1FFD:0x2003] = b"needle"
    low[LOW - 5 :] = b"early"
    high = bytearray(0x2000)
    high[:4] = b"late"
    high[0x100:0x10A] = "wide!".encode("utf-16le")
    return str(lime(tmp_path / "guest.lime", {0: bytes(low), HIGH: bytes(high)}))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command, checks its status, and returns what it printed."""

    def run(*arguments: str, status: int = 0) -> str:
        assert main(arguments) == status
        printed = capsys.readouterr()
        if status == 2:
            assert printed.out == ""
            assert printed.err.startswith("xenmapcache: error: ")
            assert printed.err.count("\n") == 1
            return printed.err
        assert printed.err == ""
        return printed.out

    return run


def shell(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*MODULE, *arguments],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )


# --- info ---------------------------------------------------------------------------


def test_info_tells_ranges_and_holes(run: Run, guest: str) -> None:
    """Memory, ranges and holes are told for people, and with --json for scripts."""
    text = run("info", guest)
    assert "memory     5 pages, 20 KiB" in text
    assert "holes      1, 8 KiB" in text
    assert "0x00005000  0x00007000   8 KiB" in text
    facts = json.loads(run("info", "--json", guest))
    assert (facts["backend"], facts["memory_end"], facts["pages"]) == ("raw", 0x7000, 5)
    assert facts["ranges"] == [
        {"address": 0, "address_hex": "0x0", "length": LOW},
        {"address": HIGH, "address_hex": f"{HIGH:#x}", "length": 0x2000},
    ]
    assert facts["holes"] == [{"address": LOW, "address_hex": f"{LOW:#x}", "length": HIGH - LOW}]
    assert facts["memory_end_hex"] == "0x7000"
    assert isinstance(facts["notes"], dict)


def test_info_without_a_known_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libxenctrl a live guest's end is unknown, as a number and in hex."""
    monkeypatch.setattr(MockBackend, "memory_end", None)
    facts = json.loads(run("info", "--json", "--length", "1M", "mock:4M"))
    assert (facts["memory_end"], facts["memory_end_hex"]) == (None, None)
    assert facts["ranges"] == [{"address": 0, "address_hex": "0x0", "length": 1 << 20}]


def test_info_shows_what_a_source_says_of_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What describe() returns is shown, whatever it is made of."""
    notes = {"xen_version": "4.17", "vcpus": 2, "list": [1, 2], "more": {"a": 1}}
    monkeypatch.setattr(MockBackend, "describe", lambda _: notes)
    text = run("info", "mock:4M")
    for line in ("xen version  4.17", "vcpus        2", "list         1, 2", "more         a 1"):
        assert line in text
    assert json.loads(run("info", "--json", "mock:4M"))["notes"] == notes


def test_info_obeys_no_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file says of itself, such as a version, may be made to do things on a terminal."""
    evil = {"xen_version": "4.17\x1b]0;evil\x07", "vcpus": "1\n2"}
    monkeypatch.setattr(MockBackend, "describe", lambda _: evil)
    shown = run("info", "mock:4M")
    assert r"4.17\x1b]0;evil\x07" in shown
    assert "\x1b" not in shown
    assert json.loads(run("info", "mock:4M", "--json"))["notes"] == evil


def test_info_limits_the_ranges_that_it_shows(run: Run, tmp_path: Path) -> None:
    """Of many ranges it shows the first, says how many more there are, and all with --all."""
    path = str(lime(tmp_path / "many.lime", {at << 13: bytes(4096) for at in range(100)}))
    text = run("info", path)
    assert text.count(" 4 KiB\n") == 40
    assert "and 60 more: see --all or --json" in text
    assert run("info", "--all", path).count(" 4 KiB\n") == 100


def test_info_of_nothing(run: Run, tmp_path: Path) -> None:
    """A dump without a page has no ranges, and no table of them; beyond its end is a hole."""
    path = str(tmp_path / "empty.core")
    with open_backend("mock", memory="1M") as source:
        write_coredump(source, path, length=0)
    text = run("info", path)
    assert re.search("memory +0 pages, 0 B", text)
    assert "from" not in text
    assert re.search("holes +1, 1 MiB", run("info", path, "--length", "1M"))


def test_info_of_a_guest_whose_holes_only_mapping_tells(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges go over the edges of the windows in which such a guest is looked at."""
    hole = (0xFFF000, 0x2000)
    guest = MockHypervisor().create_domain(memory="40M", holes=[hole])
    backend = open_backend("mock", domain=guest)
    monkeypatch.setattr(sources, "open_backend", lambda *_, **__: backend)
    facts = json.loads(run("info", "--json", "mock:40M"))
    assert facts["ranges"] == [
        {"address": 0, "address_hex": "0x0", "length": hole[0]},
        {"address": sum(hole), "address_hex": "0x1001000", "length": (40 << 20) - sum(hole)},
    ]


def test_a_source_without_an_end_needs_a_length(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a live guest's size is not known, commands ask for --length, and go on with it."""
    monkeypatch.setattr(MockBackend, "memory_end", None)
    for command in (["info"], ["strings"], ["find"], ["dump", "-o", "never"]):
        pattern = ["x"] if command == ["find"] else []
        assert "give --length, such as 4GiB" in run(*command, "mock:4M", *pattern, status=2)
    assert run("find", "mock:4M", "x", "--length", "4M", status=1) == ""


# --- read ---------------------------------------------------------------------------


def test_read_shows_lines_as_hexdump_does(run: Run, guest: str) -> None:
    """Addresses, bytes and characters; lines that repeat are squeezed, unless that is unwanted."""
    assert run("read", guest, "0x0", "0x50", "--hexdump") == (
        "00000000  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "00000010  6e 65 65 64 6c 65 00 00  00 00 00 00 00 00 00 00  |needle..........|\n"
        "00000020  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "*\n"
        "00000050\n"
    )
    text = run("read", guest, "0", "0x50", "--hexdump", "--no-squeeze")
    assert text.count("\n") == 6
    assert run("read", guest, "0x11", "3", "--hexdump") == (
        "00000011  65 65 64                                          |eed|\n00000014\n"
    )


def test_hexdump_is_that_of_hexdump(guest: str) -> None:
    """What util-linux prints for the same bytes is the same, to the last space."""
    try:
        theirs = subprocess.run(
            ["hexdump", "-C", "-s", str(0x4A), "-n", "12000", guest], capture_output=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("hexdump is not installed (Debian: bsdextrautils)")
    # A LiME header of 32 bytes comes first.
    ours = shell("read", f"raw:{guest}", "0x2a", "12000", "--hexdump").stdout
    strip = [line.partition(b"  ")[2] for line in theirs.splitlines()]
    assert [line.partition(b"  ")[2] for line in ours.splitlines()] == strip


def test_read_gives_the_bytes_to_a_pipe_and_a_hexdump_to_a_terminal(guest: str) -> None:
    """So that > and | do what is expected; --raw and --hexdump say otherwise."""
    assert shell("read", guest, "0x10", "6").stdout == b"needle"
    assert shell("read", guest, "0x10", "6", "--hexdump").stdout.startswith(b"00000010  6e 65")

    def shown(*options: str) -> bytes:
        arguments = ("read", guest, "0x10", "6", *options)
        return on_terminal(*arguments, environment=environment()).terminal

    assert shown().startswith(b"00000010  6e 65")
    assert shown("--raw") == b"needle"


@pytest.mark.slow
def test_json_of_much_memory_takes_little(run: Run) -> None:
    """The object is printed as it is read: of more than there is room for, too."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_AS, (250 << 20, -1))"
    code = f"{limit}; from xenmapcache.cli import main; main()"
    command = [sys.executable, "-c", code, "read", "mock:4M", "0", "140M", "--fill", "00", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        printed = 0
        while piece := process.stdout.read(1 << 20):
            printed += len(piece)
    assert process.returncode == 0
    assert printed > 2 * (140 << 20)
    facts = json.loads(run("read", "mock:4M", "0", "3M", "--json"))
    assert facts == {"address": 0, "address_hex": "0x0", "length": 3 << 20, "hex": "00" * (3 << 20)}


def test_a_hole_is_an_error_that_offers_fill(run: Run, guest: str) -> None:
    """Nothing is printed of a range with a hole; with --fill the hole reads as that byte."""
    for address in ("0x2ff0", "0x3000", "0x6ff0"):
        said = run("read", guest, address, "64", status=2)
        place = "0x7000" if address == "0x6ff0" else "0x3000"
        assert f"no page at {place}: add --fill 00" in said
    assert "no page at 0x3000" in run("read", guest, "0", "0x6000", status=2)
    data = shell("read", guest, "0x2ffb", "0x200d", "--fill", "ff").stdout
    assert data == b"early" + b"\xff" * 0x2000 + b"late" + bytes(4)
    facts = json.loads(run("read", guest, "0x6fff", "3", "--fill", "ab", "--json"))
    assert facts == {"address": 0x6FFF, "address_hex": "0x6fff", "length": 3, "hex": "00abab"}


@pytest.mark.timeout(60)
def test_an_enormous_range_is_refused_at_once(run: Run) -> None:
    """Beyond the end of memory is a hole, which is not searched page by page."""
    assert "no page at 0x400000" in run("read", "mock:4M", "0", "1024T", status=2)
    assert "no page at 0x10000000" in run("read", "mock:4M", "256M", "1024T", status=2)


def test_a_range_beyond_all_addresses_is_refused(run: Run) -> None:
    """As an error of the user's."""
    assert "52-bit" in run("read", "mock:4M", "0xfffffffffffff", "64", status=2)


# --- find ---------------------------------------------------------------------------


def test_find_prints_address_and_match(run: Run, guest: str) -> None:
    """Matches over a page's edge, next to holes; 1 if there is none; a range, a limit, a count."""
    both = "0x00000010  needle\n0x00001ffd  needle\n"
    assert run("find", guest, "needle") == both
    assert run("find", guest, "--hex", "6e 65 65 64 6c 65") == both.replace(
        "needle", "6e 65 65 64 6c 65"
    )
    assert run("find", guest, "--regex", "n[e]+d") == both.replace("needle", "need")
    assert run("find", guest, "earlylate", status=1) == ""
    assert run("find", guest, "early") == "0x00002ffb  early\n"
    assert run("find", guest, "wide!", status=1) == ""
    assert run("find", guest, "wide!", "--encoding", "utf-16le") == "0x00005100  wide!\n"
    assert run("find", guest, "needle", "--max-count", "1") == both.partition("\n")[0] + "\n"
    assert run("find", guest, "needle", "--start", "0x11") == both.partition("\n")[2]
    assert run("find", guest, "needle", "--length", "0x15", status=1) == ""
    assert run("find", guest, "needle", "--count") == "2\n"
    assert run("find", guest, "absent", "--count", status=1) == "0\n"
    assert json.loads(run("find", guest, "needle", "--count", "--json")) == {"count": 2}


def test_find_shows_surroundings_up_to_a_hole(run: Run, guest: str) -> None:
    """With --context a hexdump of whole lines; with --json the bytes before and after."""
    assert run("find", guest, "early", "--context", "1") == (
        "00002ff0  00 00 00 00 00 00 00 00  00 00 00 65 61 72 6c 79  |...........early|\n"
    )
    assert run("find", guest, "needle", "--context", "16").count("\n--\n") == 1
    facts = json.loads(run("find", guest, "late", "--context", "2", "--json"))
    assert facts == {
        "address": HIGH,
        "address_hex": f"{HIGH:#x}",
        "length": 4,
        "text": "late",
        "hex": b"late".hex(),
        "before": "",
        "after": "0000",
    }
    facts = json.loads(run("find", guest, "late", "--context", "0x3000", "--json"))
    assert (facts["before"], len(facts["after"])) == ("", 2 * 0x1FFC)  # none from before the hole


def test_a_match_that_goes_before_it_is_shown() -> None:
    """Surroundings of a page that was ballooned out since are empty, and no error."""
    guest = MockHypervisor().create_domain(memory="1M", holes=[(0x5000, 0x1000)])
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        assert find._around(cache, 0x5010, 0x4FF0, 0x5030) == (0x5010, b"")


def test_find_takes_numbers_of_any_size(run: Run, guest: str) -> None:
    """More matches than there can be, and more surroundings than there is memory, are all."""
    assert run("find", guest, "late", "--max-count", "9" * 30) == "0x00005000  late\n"
    shown = run("find", guest, "late", "--context", "99999999999T")
    assert shown.count("\n") == (0x7000 - HIGH) // 16


def test_find_escapes_what_is_not_text(run: Run) -> None:
    """Neither control characters nor broken UTF-8 reach the terminal."""
    line = run("find", "mock:4M", "--regex", r"\x00{3}", "--max-count", "1")
    assert line == "0x00000000  \\x00\\x00\\x00\n"
    facts = json.loads(run("find", "mock:4M", "--hex", "00:00", "--max-count", "1", "--json"))
    assert facts == {
        "address": 0,
        "address_hex": "0x0",
        "length": 2,
        "text": "\0\0",
        "hex": "0000",
    }


def test_find_bytes_with_wildcards(run: Run, guest: str) -> None:
    """Two question marks are any byte; at the beginning and the end as well."""
    for pattern in ("6e 65 ?? 64", "0x6e65??64", "6e:65:??:64"):
        lines = run("find", guest, "--hex", pattern).splitlines()
        assert lines == ["0x00000010  6e 65 65 64", "0x00001ffd  6e 65 65 64"]
    assert run("find", guest, "--hex", "?? 61 74 65 ??") == "0x00005000  6c 61 74 65 00\n"
    assert run("find", guest, "--hex", "6c ?? ?? ?? 6c", "--count", status=1) == "0\n"


def test_a_wildcard_is_any_byte(run: Run, tmp_path: Path) -> None:
    """Line ends too, which a dot of an expression is not; and what is longer than 4 KiB."""
    data = bytes(range(256)) * 48
    path = lime(tmp_path / "bytes.lime", {0: data})
    assert run("find", str(path), "--hex", "09 ?? 0b", "-m", "1") == "0x00000009  09 0a 0b\n"
    pattern = "00 ff" + " ??" * 5000 + " 88"
    assert run("find", str(path), "--hex", pattern, "--count", status=1) == "0\n"
    pattern = "fe ff" + " ??" * 5000 + " 88"
    assert run("find", str(path), "--hex", pattern, "--count") == "2\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hex", "xy"], "'xy' is not bytes in hex; write --hex 'de ad'"),
        (["--hex", "4?"], "'4?' is not bytes in hex; write --hex 'de ad', or 'de ?? ad'"),
        (["--hex", "de ???"], "'de ???' is not bytes in hex"),
        (["--hex", "?? ??"], "'?? ??' has no byte to look for"),
        (["--hex", "de ??", "-i"], "--ignore-case: bytes in hex have no case"),
        (["--regex", "("], "'(' is not a regular expression: missing )"),
        (["--regex", "x*"], "pattern b'x*' matches the empty string"),
        (["--regex", "x{99999999999}"], "is not a regular expression: the repetition number"),
        (["--regex", "(" * 9999 + "x" + ")" * 9999], "is not a regular expression: maximum recurs"),
        ([""], "the pattern is empty"),
        (["--encoding", "utf-16le", "\udcff"], "search for bytes with --hex"),
        (["x", "--start", "5P"], ""),
    ],
)
def test_patterns_that_cannot_be(run: Run, arguments: list[str], complaint: str) -> None:
    """Each is an error of one line that says what to write."""
    try:
        assert complaint in run("find", "mock:4M", *arguments, status=2)
    except SystemExit as exit_:
        assert exit_.code == 2


def test_a_flat_image_is_read_where_it_belongs(run: Run, tmp_path: Path) -> None:
    """An address or ranges after the name of a flat image, in every command."""
    path = tmp_path / "flat"
    path.write_bytes(b"low".ljust(0x1000, b"\0") + b"high".ljust(0x1000, b"\0"))
    assert run("find", f"raw:{path}", "high") == "0x00001000  high\n"
    assert run("find", f"raw:{path}@1M", "high") == "0x00101000  high\n"
    assert run("find", f"raw:{path}@0+4k,0x80000000+4k", "high") == "0x80000000  high\n"
    assert run("diff", f"raw:{path}@0", f"raw:{path}@0+4k,4k+4k") == ""
    facts = json.loads(run("info", "--json", f"raw:{path}@0+4k,0x5000+4k"))
    assert [each["address"] for each in facts["ranges"]] == [0, 0x5000]
    assert "0x7 must be a multiple of 0x1000" in run("info", f"raw:{path}@7", status=2)
    assert "lacks 0x1000 bytes" in run("info", f"raw:{path}@0+12k", status=2)


def test_a_file_that_is_no_memory_is_not_read_as_memory(run: Run, tmp_path: Path) -> None:
    """Neither a bare path nor raw: reads a format that is known; with an address raw: does."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    for spec in (str(path), f"raw:{path}", f"coredump:{path}", f"save:{path}"):
        said = run("find", spec, "QFI", status=2)
        assert "is a disk of QEMU (qcow2)" in said
        assert "raw:" not in said
    assert run("find", f"raw:{path}@0", "QFI") == "0x00000000  QFI\n"


# --- strings ------------------------------------------------------------------------


def test_strings_and_where_they_lie(run: Run, guest: str) -> None:
    """Runs of printable characters, in either encoding; 1 if there are none."""
    assert run("strings", guest) == (
        "0x00000010  needle\n0x00001ffd  needle\n0x00002ffb  early\n0x00005000  late\n"
    )
    assert run("strings", guest, "-n", "6", "--start", "0x1000") == "0x00001ffd  needle\n"
    assert run("strings", guest, "--encoding", "utf-16le") == "0x00005100  wide!\n"
    assert run("strings", guest, "-n", "7", status=1) == ""
    lines = run("strings", guest, "--json", "--length", "0x1000").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"address": 0x10, "address_hex": "0x10", "text": "needle"}
    ]


# --- diff ---------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path, guest: str) -> str:
    """The same guest later: two pages changed, one gone, one new."""
    low = bytearray(LOW)
    low[0x10:0x16] = b"noodle"
    low[0x1000] = 1
    low[0x2FFB:] = b"early"
    return str(lime(tmp_path / "other.lime", {0: bytes(low), 0x4000: b"late".ljust(0x2000, b"\0")}))


def test_diff_prints_ranges(run: Run, guest: str, other: str) -> None:
    """Pages that differ and pages that one lacks, as ranges; 0 if all is equal, else 1."""
    assert run("diff", guest, guest) == ""
    assert run("diff", guest, other, status=1) == (
        "0x00000000..0x00003000      12 KiB  differs\n"
        f"0x00004000..0x00005000       4 KiB  only in {other}\n"
        "0x00005000..0x00006000       4 KiB  differs\n"
        f"0x00006000..0x00007000       4 KiB  only in {guest}\n"
    )
    facts = json.loads(run("diff", guest, other, "--json", "--start", "0x4000", status=1))
    assert facts == {
        "equal": False,
        "ranges": [
            {
                "kind": "only in second",
                "address": 0x4000,
                "address_hex": "0x4000",
                "length": 0x1000,
            },
            {"kind": "differs", "address": 0x5000, "address_hex": "0x5000", "length": 0x1000},
            {"kind": "only in first", "address": 0x6000, "address_hex": "0x6000", "length": 0x1000},
        ],
    }
    assert json.loads(run("diff", guest, guest, "--json")) == {"equal": True, "ranges": []}
    assert run("diff", "--quiet", guest, other, status=1) == ""
    assert run("diff", "--quiet", guest, guest) == ""


def test_diff_of_one_page_of_several(run: Run, tmp_path: Path) -> None:
    """Pages next to the one that differs are equal, though they lie in one bucket with it."""
    pages = bytearray(0x4000)
    one = str(lime(tmp_path / "one.lime", {0: bytes(pages)}))
    pages[0x2800] = 1
    other = str(lime(tmp_path / "other.lime", {0: bytes(pages)}))
    assert run("diff", one, other, status=1) == "0x00002000..0x00003000       4 KiB  differs\n"


def test_diff_asks_no_guest_for_what_is_behind_its_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with one page far away is not compared with a live guest's nothing, page by page."""
    far = str(lime(tmp_path / "far.lime", {(1 << 52) - PAGE_SIZE: bytes(PAGE_SIZE)}))
    maps = 0
    make = MockBackend.map

    def counted(self: MockBackend, gfn: int, count: int, *, writable: bool) -> Mapping:
        nonlocal maps
        maps += 1
        assert maps < 100
        return make(self, gfn, count, writable=writable)

    monkeypatch.setattr(MockBackend, "map", counted)
    assert run("diff", far, "mock:4M", status=1) == (
        "0x00000000..0x00400000       4 MiB  only in mock:4M\n"
        f"0xffffffffff000..0x10000000000000       4 KiB  only in {far}\n"
    )


def test_diff_of_what_both_have(run: Run, tmp_path: Path) -> None:
    """With --common, pages that only one has do not count; pages that differ still do."""
    first = str(lime(tmp_path / "first.lime", {0: b"a" * 0x3000, 0x8000: b"a" * 0x1000}))
    second = str(lime(tmp_path / "second.lime", {0x1000: b"a" * 0x2000, 0x9000: b"b" * 0x1000}))
    assert "only in" in run("diff", first, second, status=1)
    assert run("diff", "--common", first, second) == ""
    assert json.loads(run("diff", "--common", "--json", first, second))["equal"] is True
    third = str(lime(tmp_path / "third.lime", {0x1000: b"c" * 0x1000}))
    shown = run("diff", "--common", first, third, status=1)
    assert shown == "0x00001000..0x00002000       4 KiB  differs\n"
    said = run("diff", "--common", "--start", "0x8000", first, second, status=2)
    assert "no page in common from 0x8000 to 0xa000" in said


def test_diff_prints_bytes(run: Run, guest: str, other: str) -> None:
    """With --bytes what differs is shown, the old and the new, a line's worth at a time."""
    assert run("diff", "--show-bytes", guest, other, "--length", "0x1800", status=1) == (
        "0x00000011  65 65  ->  6f 6f\n0x00001000  00  ->  01\n"
    )
    odd = run("diff", "--show-bytes", guest, other, "--start", "0x12", "--length", "3", status=1)
    assert odd == "0x00000012  65  ->  6f\n"
    facts = json.loads(
        run("diff", guest, other, "--show-bytes", "--json", "--length", "64", status=1)
    )
    assert facts["ranges"] == [
        {
            "kind": "differs",
            "address": 0x11,
            "address_hex": "0x11",
            "length": 2,
            "first": "6565",
            "second": "6f6f",
        }
    ]


# --- all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["info", "absent.core"], "absent.core: No such file or directory"),
        (["info", "raw:absent"], "absent: No such file or directory"),
        (["info", "/"], "/: Is a directory"),
        (["info", "mock:"], "'mock:' is incomplete; write mock:SIZE"),
        (["info", "mock:many"], "'many' is not a size"),
        (["info", "disk:0"], "'disk:0' is neither a source nor a file; write xen:DOMID, xen:NAME"),
        (["diff", "mock:4M", "absent"], "absent: No such file or directory"),
        (["info", "/dev/null"], "/dev/null is not a regular file"),
        (["info", "xen:99999"], "domid 99999 is not in 0..32751"),
        (["find", "mock:4M", "x", "--start", "1M", "--length", "4096T"], "52-bit"),
    ],
)
def test_what_cannot_be_opened_says_why(run: Run, arguments: list[str], complaint: str) -> None:
    """A source that is not there, or no source, is one line and status 2."""
    assert complaint in run(*arguments, status=2)


def test_errors_of_a_user_show_no_traceback(tmp_path: Path) -> None:
    """As seen from a shell: one line on stderr, nothing on stdout."""
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(8192))
    done = shell("info", str(flat))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == (
        f"xenmapcache: error: {flat}: unrecognised format; known are xl dump-core, xl save, ELF "
        f"core, KDUMP and LiME. Write raw:{flat} only for a flat image\n"
    )


@pytest.mark.slow
def test_what_is_resident_stays_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that go through all memory never hold more than 64 MiB of it."""
    most = 0
    make = MockBackend.map

    def watched(self: MockBackend, gfn: int, count: int, *, writable: bool) -> Mapping:
        nonlocal most
        most = max(most, *(cache.stats().resident_bytes for cache in caches))
        return make(self, gfn, count, writable=writable)

    caches: list[MapCache] = []

    class Watched(MapCache):
        def __init__(self, backend: Backend, *, max_resident: int, bucket_shift: int) -> None:
            super().__init__(backend, max_resident=max_resident, bucket_shift=bucket_shift)
            caches.append(self)

    monkeypatch.setattr(sources, "MapCache", Watched)
    monkeypatch.setattr(MockBackend, "map", watched)
    for arguments in (["find", "mock:80M", "x"], ["strings", "mock:80M"]):
        run(*arguments, status=1)
    run("diff", "mock:80M", "mock:80M")
    assert 32 << 20 < most <= sources.MAX_RESIDENT


def test_a_library_that_fails_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Xen says is told with its hint."""

    def refuse(*_: object, **__: object) -> Backend:
        raise XenCallError("xenforeignmemory_map2", 3, 3, "there is no such domain (see xl list)")

    monkeypatch.setattr(sources, "open_backend", refuse)
    assert "for domain 3 with ESRCH" in run("info", "xen:3", status=2)


def test_data_needs_no_rich(
    run: Run, guest: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where rich is not installed only tables are missing, and they say so."""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert run("find", guest, "late") == "0x00005000  late\n"
    run("strings", guest)
    run("read", guest, "0", "--hexdump")
    run("diff", guest, guest)
    run("info", guest, "--json")
    run("dump", guest, "-o", str(tmp_path / "out"))


def test_pages_are_the_guests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever a comparison begins, what differs is told by the guest's pages."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(4 * PAGE_SIZE))
    second.write_bytes(bytes(PAGE_SIZE + 0x10) + b"x" + bytes(3 * PAGE_SIZE - 0x11))
    assert main(["diff", f"raw:{first}", f"raw:{second}", "--start", "0x800"]) == 1
    assert capsys.readouterr().out.startswith("0x00001000..0x00002000 ")


def test_find_ignores_case(run: Run, guest: str) -> None:
    """Of ASCII letters, in text and in expressions; bytes in hex have no case."""
    both = run("find", guest, "needle")
    assert run("find", guest, "NeeDle", status=1) == ""
    assert run("find", guest, "NeeDle", "-i") == both
    assert run("find", guest, "N[E]+DLE", "--regex", "--ignore-case") == both
    assert run("find", guest, "WIDE!", "-i", "--encoding", "utf-16le") == "0x00005100  wide!\n"
    assert run("find", guest, "NEEDLE", "-i", "-c") == "2\n"
    assert run("find", guest, "e.", "-i", status=1) == ""
    said = run("find", guest, "6e", "--hex", "-i", status=2)
    assert "bytes in hex have no case; search for text" in said


def test_options_that_other_tools_have(run: Run, guest: str) -> None:
    """The short and long names of strings, grep, cmp and hexdump."""
    assert run("find", guest, "needle", "-m", "1") == "0x00000010  needle\n"
    assert run("strings", guest, "-n", "6") == run("strings", guest, "--bytes", "6")
    assert run("diff", guest, guest, "-q") == ""
    for length in (["-n", "4"], ["--length", "4"], ["4"]):
        assert json.loads(run("read", guest, "0x10", *length, "--json"))["length"] == 4
    assert json.loads(run("read", guest, "0x10", "--json"))["length"] == 256
    with pytest.raises(SystemExit):
        main(["read", guest, "0", "4", "-n", "4"])


def test_info_makes_few_map_calls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large guest each call shows 4 MiB: a call for each MiB takes longer."""
    calls = []
    make = MockBackend.map

    def counted(self: MockBackend, gfn: int, count: int, *, writable: bool) -> Mapping:
        calls.append(count)
        return make(self, gfn, count, writable=writable)

    monkeypatch.setattr(MockBackend, "map", counted)
    monkeypatch.setattr(MockBackend, "present", lambda *_: None)  # as a live guest's
    facts = json.loads(run("info", "mock:1G", "--json"))
    assert facts["pages"] == 1 << 18
    assert len(calls) == 256
    assert "0x1000 to 0x1000000000 bytes" in run("info", "mock:1T", status=2)


@pytest.mark.parametrize(("room", "expected"), [(16 * MiB, 16 * MiB), (64 * GiB, 1 * GiB)])
def test_a_command_maps_no_more_than_the_source_has_room_for(
    room: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a mapped page takes one of Dom0's, a command with a bound of its own maps less."""
    domain = MockHypervisor().create_domain(memory="1M")
    backend = open_backend("mock", domain=domain)
    backend.mapping_room = room
    monkeypatch.setattr("xenmapcache.cli.sources.open_backend", lambda *_, **__: backend)
    with sources.open_cache("xen:1", max_resident="1GiB") as cache:
        assert cache.max_resident == expected
