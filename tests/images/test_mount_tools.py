"""A real Linux guest's memory, mounted: the files are those that we write, and tools read them."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from tests.adapters.test_mount_fuse import folder, mounted
from tests.images import tools
from tests.images.lab import Images, cache_folder
from xenmapcache import MapCache, find_vmcoreinfo, open_source, write_lime, write_vmcore

__all__ = ["folder"]

pytestmark = pytest.mark.images


@pytest.mark.parametrize("form", ["plain.elf", "guest.raw"])
def test_tools_on_a_mounted_guest(
    lab_images: Images,
    folder: Path,
    tmp_path: Path,
    form: str,
) -> None:
    """They are the same as those on disk; drgn finds the kernel in memory.elf, and crash, too."""
    path = lab_images.path(form)
    source = f"raw:{path}" if path.suffix == ".raw" else str(path)
    with open_source(source) as backend, MapCache(backend) as cache:
        write_vmcore(backend, tmp_path / "memory.elf", machine="x86-64")
        write_lime(backend, tmp_path / "memory.lime")
        info = find_vmcoreinfo(cache)
    assert info is not None
    release = info.value("OSRELEASE")
    assert release is not None
    with mounted(source, folder):
        for name in ("memory.elf", "memory.lime"):
            assert filecmp.cmp(folder / name, tmp_path / name, shallow=False)
            (tmp_path / name).unlink()  # 150 MB each
        drgn = tools.module("drgn", "drgn")
        program = drgn.Program()
        program.set_core_dump(folder / "memory.elf")
        assert program["UTS_RELEASE"].string_().decode() == release
        del program
        found = sorted(cache_folder().glob(f"vmlinux-{release}-*"))
        if not found:
            tools.missing(f"no debug package of {release} is kept here")
        crash = tools.command("crash")
        (tmp_path / "commands").write_text("sys\nquit\n")
        said = tools.run(
            *(crash, "--no_scroll", "-i", tmp_path / "commands", found[0], folder / "memory.elf")
        )
        assert f"RELEASE: {release}" in said
