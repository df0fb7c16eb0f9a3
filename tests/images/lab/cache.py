"""Where the images are kept, and that they are made once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.xen.lab.prerequisites import LabUnavailableError, install_missing

from . import forms, machine

TOOLS: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "makedumpfile": "makedumpfile",
    "setpriv": "util-linux",
    "apt-cache": "apt",
    "dpkg": "dpkg",
}
_DISK_BYTES: Final = 3 << 30


@dataclass(frozen=True)
class Images:
    """A folder of images of one moment. They are never written to after they were made."""

    folder: Path

    def has(self, file: str) -> bool:
        """Tell whether a form exists; one may be absent if it is optional."""
        return (self.folder / file).is_file()

    def path(self, file: str) -> Path:
        """Return the path of a form, one of FORMS.

        Raises:
            LabUnavailableError: this machine's tools cannot write it.
        """
        if not self.has(file):
            raise LabUnavailableError(f"QEMU or makedumpfile cannot write {file} on this machine")
        return self.folder / file


def cache_folder() -> Path:
    """Where images are kept."""
    if folder := os.environ.get("XENMAPCACHE_IMAGES_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xenmapcache-images"


def images() -> Images:
    """Return the images, which are made now unless they exist.

    Raises:
        LabUnavailableError: this machine cannot make them; the text says why.
    """
    folder = cache_folder() / _key()
    if not folder.exists():
        install_missing(TOOLS)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # another process may have held the lock
                _make(folder)
    return Images(folder)


def _key() -> str:
    digest = hashlib.sha256()
    for path in (machine.INIT, Path(machine.__file__), Path(forms.__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _make(folder: Path) -> None:
    # We hold the lock, so a folder that is being made belongs to a process that died. One finished
    # set is kept, or two checkouts that differ would make theirs in turns.
    others = [path for path in folder.parent.iterdir() if path.is_dir()]
    dead = [path for path in others if path.name.startswith("making-")]
    kept = sorted(set(others) - set(dead), key=lambda path: path.stat().st_mtime)
    for old in [*dead, *kept[:-1]]:
        shutil.rmtree(old)
    if (free := shutil.disk_usage(folder.parent).free) < _DISK_BYTES:
        raise LabUnavailableError(
            f"{folder.parent} has {free >> 20} MiB; {_DISK_BYTES >> 20} needed"
        )
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    try:
        with tempfile.TemporaryDirectory(prefix="xenmapcache-images-") as work:
            machine.write_images(made, Path(work))
        forms.run_makedumpfile(made)
        absent = [each.file for each in forms.FORMS if not (made / each.file).is_file()]
        lacking = [each.file for each in forms.FORMS if each.file in absent and not each.optional]
        if lacking:
            raise LabUnavailableError(f"QEMU or makedumpfile did not write {', '.join(lacking)}")
        for path in made.iterdir():
            path.chmod(0o444)
        made.chmod(0o755)
        made.rename(folder)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(made, ignore_errors=True)
        lines = error.stderr.decode(errors="replace").splitlines()[-3:]
        raise LabUnavailableError(f"{' '.join(error.cmd)} failed: {' '.join(lines)}") from error
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
