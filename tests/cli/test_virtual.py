"""``translate`` and ``read --virtual``: a guest with a kernel's page tables, in a file."""

from __future__ import annotations

import json
import struct

import pytest

from tests.images import writers
from tests.images.linux_guest import (
    BANNER,
    BANNER_AT,
    FAR,
    HOLES,
    KERNEL_MAP,
    PAGE_TABLES,
    create,
    virtual,
)
from xenmapcache import MockDomain
from xenmapcache.cli import main

AT = virtual(BANNER_AT)
HOLE = HOLES[1][0]
END = KERNEL_MAP + (2 << 21)
"""Of what is mapped by 2 MiB; 5 pages on, one is mapped again."""


@pytest.fixture(scope="module")
def domain() -> MockDomain:
    return create()


@pytest.fixture(scope="module")
def guest(domain: MockDomain, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ELF core with QEMU's note of one CPU, which uses the kernel's page tables."""
    loads, start = [], 0
    for hole, length in [*HOLES, (16 << 20, 0)]:
        loads.append(writers.Load(start, domain.read(start, hole - start)))
        start = hole + length
    numbers = [0] * 24
    numbers[18], numbers[21], numbers[22] = 0x80050033, PAGE_TABLES, 0x750EB0
    note = writers.note(b"QEMU", 0, struct.pack("<2I18Q240x6Q", 1, 440, *numbers))
    path = tmp_path_factory.mktemp("guest") / "guest.elf"
    path.write_bytes(writers.elf_core(loads, notes=note))
    return str(path)


def run(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str, status: int = 0) -> bytes:
    assert main(arguments) == status
    printed = capsysbinary.readouterr()
    if status == 2:
        assert printed.out == b""
        assert printed.err.startswith(b"xenmapcache: error: ")
        return printed.err
    assert printed.err == b""
    return printed.out


def test_translate(guest: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """A line for each address, and one for each level."""
    text = run(capsysbinary, "translate", guest, hex(AT), hex(FAR[0] + 5)).decode()
    assert text == (
        f"{AT:#018x}  {BANNER_AT:#010x}  2 MiB page, rwx kernel\n"
        "  PML4  0x00500ff8  0x0000000000501063\n"
        "  PDPT  0x00501ff0  0x0000000000502063\n"
        "  PD    0x00502000  0x00000000004000e3\n"
        f"{FAR[0] + 5:#018x}  {FAR[1] + 5:#010x}  4 KiB page, rwx kernel\n"
        "  PML4  0x00500ff8  0x0000000000501063\n"
        "  PDPT  0x00501ff0  0x0000000000502063\n"
        "  PD    0x00502010  0x0000000000503063\n"
        "  PT    0x00503028  0x0000000000003063\n"
    )


def test_translate_what_is_not_mapped(
    guest: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The steps up to the level that fails are shown; the other lines are there."""
    text = run(capsysbinary, "translate", guest, hex(FAR[0] - 1), hex(1 << 63), hex(AT), status=1)
    lines = text.decode().splitlines()
    assert lines[0].startswith(f"{FAR[0] - 1:#018x}  virtual address {FAR[0] - 1:#x}: level PT, ")
    assert [line.split()[0] for line in lines[1:5]] == ["PML4", "PDPT", "PD", "PT"]
    assert lines[5].startswith("0x8000000000000000  virtual address 0x8000000000000000: x86-64 ")
    assert lines[6].startswith(f"{AT:#018x}  ")


def test_translate_for_scripts(guest: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """One object; addresses are in hex as well."""
    text = run(capsysbinary, "translate", "--json", guest, hex(FAR[0]), "0", status=1)
    facts = json.loads(text)
    assert facts == {
        "machine": "x86-64",
        "levels": 4,
        "root": PAGE_TABLES,
        "root_hex": hex(PAGE_TABLES),
        "addresses": [
            {
                "address": FAR[0],
                "address_hex": hex(FAR[0]),
                "physical": FAR[1],
                "physical_hex": hex(FAR[1]),
                "page_size": 4096,
                "writable": True,
                "executable": True,
                "user": False,
                "steps": facts["addresses"][0]["steps"],
            },
            {
                "address": 0,
                "address_hex": "0x0",
                "error": facts["addresses"][1]["error"],
                "steps": [
                    {
                        "level": "PML4",
                        "entry_address": PAGE_TABLES,
                        "entry_address_hex": hex(PAGE_TABLES),
                        "entry": 0,
                        "entry_hex": "0x0",
                    }
                ],
            },
        ],
    }
    assert len(facts["addresses"][0]["steps"]) == 4
    assert "level PML4, entry 0x0 at guest-physical 0x500000" in facts["addresses"][1]["error"]


@pytest.mark.parametrize(
    "options",
    [
        ["--cpu", "0"],
        ["--root", hex(PAGE_TABLES)],
        ["--root", hex(PAGE_TABLES | 0xFFF), "--levels", "4", "--machine", "x86-64"],
    ],
)
def test_other_page_tables(
    guest: str, capsysbinary: pytest.CaptureFixture[bytes], options: list[str]
) -> None:
    """A CPU's, or those at an address."""
    text = run(capsysbinary, "translate", guest, hex(AT), *options)
    assert text.startswith(f"{AT:#018x}  {BANNER_AT:#010x}  2 MiB".encode())
    read = run(capsysbinary, "read", guest, "--virtual", hex(AT), *options, "-n", "13")
    assert read == BANNER[:13]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--cpu", "1"], "cpu must be 0 to 0, not 1"),
        (["--root", "0", "--levels", "3"], "levels must be 4 or 5 for x86-64"),
        (["--levels", "5"], "--levels needs --root"),
        (["--machine", "arm64"], "--machine needs --root"),
        (["--cpu", "0", "--half", "lower"], "--half needs --root"),
    ],
)
def test_page_tables_that_cannot_be(
    guest: str, capsysbinary: pytest.CaptureFixture[bytes], options: list[str], complaint: str
) -> None:
    """One line says what is wrong."""
    for command in (["translate", guest, "0"], ["read", "--virtual", guest, "0"]):
        assert complaint in run(capsysbinary, *command, *options, status=2).decode()


def test_arm_is_the_half_that_was_named(
    guest: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Its entries are of other bits: 2 MiB of x86-64 are a table here."""
    arguments = ("--root", hex(PAGE_TABLES), "--machine", "arm64", "--half")
    address = hex(0xFFFF_0000_0000_0000 | AT & 0xFFFF_FFFF_FFFF)
    text = run(capsysbinary, "translate", guest, address, *arguments, "upper", status=1)
    assert b"level L3, entry 0x" in text
    assert b"  L0    0x00500ff8" in text
    text = run(capsysbinary, "translate", guest, address, *arguments, "lower", status=1)
    assert b"arm64 tables of 4 levels have 0x0 to 0xffffffffffff;" in text


@pytest.mark.parametrize("number", ["-1", "x", "0x1", "1234567890", "²"])
def test_numbers(guest: str, capsys: pytest.CaptureFixture[str], number: str) -> None:
    """A CPU's number is digits."""
    with pytest.raises(SystemExit):
        main(["translate", guest, "0", f"--cpu={number}"])
    assert "must be a number of at least 0" in capsys.readouterr().err


def test_read_virtual(
    domain: MockDomain, guest: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The addresses that are shown are virtual; a range over several pages is whole."""
    text = run(capsysbinary, "read", guest, "--virtual", "--hexdump", hex(AT), "16").decode()
    assert text == (
        "ffffffff80081000  4c 69 6e 75 78 20 76 65  72 73 69 6f 6e 20 36 2e  |Linux version 6.|\n"
        "ffffffff80081010\n"
    )
    data = run(capsysbinary, "read", guest, "--virtual", hex(virtual(0x5FF000)), "-n", "8k")
    assert data == domain.read(0x5FF000, 0x2000)
    text = run(capsysbinary, "read", guest, "--virtual", "--json", hex(AT), "5").decode()
    facts = {"address": AT, "address_hex": hex(AT), "length": 5, "hex": BANNER[:5].hex()}
    assert json.loads(text) == facts
    assert run(capsysbinary, "read", guest, "--virtual", hex(AT), "0") == b""


def test_read_virtual_with_missing_pages(
    domain: MockDomain, guest: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Pages that are not mapped, or that the file lacks, are an error, or filled."""
    start = FAR[0] - 4096 - 16
    error = run(capsysbinary, "read", guest, "--virtual", hex(start), "-n", "8224", status=2)
    assert f"virtual address {start:#x}: level PT, entry 0x0".encode() in error
    command = ("read", guest, "--virtual", "--fill", "aa", "-n")
    data = run(capsysbinary, *command, "8224", hex(start))
    assert data == b"\xaa" * 4112 + domain.read(FAR[1], 4096) + b"\xaa" * 16
    start = virtual(HOLE) - 16
    error = run(capsysbinary, "read", guest, "--virtual", hex(start), "-n", "32", status=2)
    expected = f"virtual address {virtual(HOLE):#x}: level page, at guest-physical {HOLE:#x}: "
    assert expected.encode() in error
    data = run(capsysbinary, *command, "0x8020", hex(start))
    after = domain.read(HOLE + 0x8000, 16)
    assert data == domain.read(HOLE - 16, 16) + b"\xaa" * 0x8000 + after
    # A page that is mapped comes before one that is not.
    data = run(capsysbinary, *command, "32", hex(END - 16))
    assert data == domain.read(0x800000 - 16, 16) + b"\xaa" * 16


def test_tables_that_change_during_a_read(
    guest: str, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live guest may take a page away after it was looked at: that is an error, too."""
    monkeypatch.setattr("xenmapcache.cli.read._refuse_unmapped", lambda *_: None)
    error = run(capsysbinary, "read", guest, "--virtual", hex(FAR[0] - 1), status=2)
    assert b"level PT" in error


def test_page_tables_need_virtual(guest: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """An option without its use is an error."""
    for options in (["--cpu", "0"], ["--root", "0"], ["--levels", "4"], ["--half", "upper"]):
        error = run(capsysbinary, "read", guest, "0", *options, status=2)
        assert f"{options[0]} needs --virtual".encode() in error


def test_a_guest_that_is_not_linux(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """The error says which options help."""
    error = run(capsysbinary, "translate", "mock:4M", "0", status=2)
    assert b"has no VMCOREINFO" in error
