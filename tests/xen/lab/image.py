"""Building images, once, into a cache: Xen, a kernel, ramdisks, and Dom0's file system.

The cache folder is XENMAPCACHE_LAB_CACHE, else xenmapcache-lab below the user's cache folder. An
image is named after a hash of everything we put into it: a changed script or package list builds a
new one, and nothing else does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import guest_config as guest_configs
from . import ramdisk
from .guest_config import guest_config
from .hypervisor import hypervisor
from .platform import Platform
from .prerequisites import LabUnavailableError, require, tool

BAKED: Final = Path(__file__).parent / "baked"
MODULES: Final = (
    "crc32c_generic",  # ext4 asks the kernel for it by name: modules.dep does not know
    "ext4",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "xen_privcmd",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xenfs",
    "fuse",
)
GUEST_MODULES: Final = ("xen_privcmd",)  # hypercalls of the agent; see tests/xen/guest
DRIVERS: Final = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_rng", "xen_gntalloc")
"""Of a guest with Debian's own drivers; see tests/xen/stock_guest.py."""
OURS: Final = (ramdisk.__file__, guest_configs.__file__)
"""What else makes an image."""
# Hundreds of megabytes that Dom0 never opens: half of the time of building an image.
EXCLUDED: Final = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "*/lib/modules/*/kernel/drivers/*",
    "/etc/kernel/postinst.d/*",  # would run initramfs-tools; see ramdisk.py
)
INCLUDED: Final = tuple(
    f"*/lib/modules/*/kernel/drivers/{kind}/*" for kind in ("xen", "virtio", "block", "char")
)
# Where no package is configured, mmdebstrap leaves these links to its caller.
MERGED_USR: Final = """cd "$1"
for name in bin sbin lib lib64; do mkdir -p usr/$name; ln -sf usr/$name $name; done"""
VARIANTS: Final[dict[str, list[str]]] = {"minbase": [], "extract": [f"--setup-hook={MERGED_USR}"]}


@dataclass(frozen=True)
class Image:
    """The files QEMU needs to boot one machine. They are never written to after they were built."""

    platform: Platform
    folder: Path
    hypervisor: Path
    """Unpacked: QEMU's loaders take no gzip."""

    @property
    def root(self) -> Path:
        """The ext4 file system of Dom0."""
        return self.folder / "root.img"

    @property
    def kernel(self) -> Path:
        """Dom0's kernel, unpacked: an ELF file, or on arm64 an Image."""
        return self.folder / "vmlinux"

    @property
    def ramdisk(self) -> Path:
        """Dom0's initial ramdisk."""
        return self.folder / "ramdisk"


def cache_folder() -> Path:
    """Where images are kept."""
    if folder := os.environ.get("XENMAPCACHE_LAB_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xenmapcache-lab"


def image(platform: Platform) -> Image:
    """The image of `platform`, built now unless it is there already.

    Platforms of the same release and architecture share theirs.

    Raises:
        LabUnavailableError: this machine cannot build or run it, or the build failed.
    """
    cache = cache_folder()
    name = f"{platform.release.xen}-{platform.architecture.name}"
    folder = cache / f"{name}-{_key(platform)}"
    require(cache, platform.architecture.host, build=not folder.exists())
    own = folder / "xen"
    if not folder.exists() or platform.source is not None:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{name}.lock"):
            if not folder.exists():  # another builder may have held the lock
                _build(platform, name, folder)
            if platform.source is not None:
                own = hypervisor(platform, platform.source, cache)
    return Image(platform, folder, own)


def _key(platform: Platform) -> str:
    content = (platform.release, platform.architecture, platform.packages)
    digest = hashlib.sha256(repr(content).encode())
    for path in sorted([*BAKED.iterdir(), Path(__file__), *map(Path, OURS)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(platform: Platform, name: str, folder: Path) -> None:
    # We hold the lock: a folder being built is a dead builder's. One finished image is kept, since
    # two checkouts that differ would else build in turns.
    others = sorted(folder.parent.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    dead = [path for path in others if "-building-" in path.name]
    for old in [*dead, *[path for path in others if path not in dead][:-1]]:
        shutil.rmtree(old)
    work = Path(tempfile.mkdtemp(prefix=f"{name}-building-", dir=folder.parent))
    try:
        tree = work / "tree"
        _debian(platform, tree)
        _configure(tree)
        _bake(platform, tree, work)
        # Journal and checksums protect a file system that outlives its session; this one does not.
        options = ["-O", "^has_journal,^metadata_csum", "-E", "lazy_itable_init=1,root_owner=0:0"]
        options += ["-d", str(tree)]
        _run(tool("mke2fs"), "-q", "-t", "ext4", *options, str(work / "root.img"), "3G")
        shutil.rmtree(tree)
        work.chmod(0o755)  # mkdtemp's 0700 would keep a user who may not build from booting
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _debian(platform: Platform, tree: Path) -> None:
    architecture = platform.architecture
    options = [f"--variant={architecture.variant}", f"--architectures={architecture.name}"]
    options += VARIANTS[architecture.variant]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    options += [f"--dpkgopt=path-include={pattern}" for pattern in INCLUDED]
    options += ["--dpkgopt=force-unsafe-io", f"--include={','.join(platform.packages)}"]
    if proxy := _proxy():
        options.append(f'--aptopt=Acquire::http::Proxy "{proxy}"')
    # Without a mirror named, mmdebstrap takes Debian's own.
    mirror = [url] if (url := os.environ.get("XENMAPCACHE_LAB_MIRROR")) else []
    command = [tool("mmdebstrap"), *options, platform.release.suite, str(tree), *mirror]
    # mmdebstrap mounts /dev and /proc in the tree. In its own namespaces, these go with it however
    # it ends; else deleting the tree of a killed one would delete the machine's devices.
    alone = [tool("setpriv"), "--pdeathsig", "KILL", tool("unshare")]
    alone += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0:
        command = [*alone, *command]
    _run(*command)


def _proxy() -> str:
    # mmdebstrap does not read this machine's apt configuration, where a proxy may be set.
    command = ["apt-config", "shell", "P", "Acquire::http::Proxy"]
    shell = subprocess.run(command, text=True, capture_output=True, check=True)
    return shell.stdout.partition("'")[2].rpartition("'")[0]


def _configure(tree: Path) -> None:
    # What maintainer scripts do, as far as it matters here and they did not run. dom0-init runs
    # ldconfig, which knows only its own machine's libraries.
    (modules,) = (tree / "usr/lib/modules").iterdir()
    if not (modules / "modules.dep").exists():
        _run(tool("depmod"), "-b", str(tree), modules.name)
    for name, target in (("run", "/run"), ("lock", "/run/lock")):
        link = tree / "var" / name
        if not link.is_symlink():
            shutil.rmtree(link, ignore_errors=True)
            link.symlink_to(target)


def _bake(platform: Platform, tree: Path, work: Path) -> None:
    release, architecture = platform.release, platform.architecture
    baked = {path.name: path.read_bytes() for path in BAKED.iterdir()}
    busybox = (tree / "bin/busybox").read_bytes()
    (modules,) = (tree / "usr/lib/modules").iterdir()
    (kernel,) = (tree / "boot").glob("vmlinuz-*")

    order = ramdisk.load_order(modules, MODULES)
    initial = ramdisk.ramdisk(baked["ramdisk-init"], busybox, map(ramdisk.module, order))
    (work / "ramdisk").write_bytes(initial)
    (work / "vmlinux").write_bytes(ramdisk.unpacked(kernel.read_bytes()))
    debians = tree / f"boot/xen-{release.xen}-{architecture.name}"
    packed = debians.with_name(f"{debians.name}.gz")
    found = packed if packed.exists() else debians
    (work / "xen").write_bytes(ramdisk.unpacked(found.read_bytes()))

    lab = tree / "lab"
    lab.mkdir()
    (lab / "init").write_bytes(baked["dom0-init"].replace(b"@RELEASE@", release.xen.encode()))
    (lab / "init").chmod(0o755)
    order = ramdisk.load_order(modules, GUEST_MODULES)
    guest = ramdisk.ramdisk(baked["guest-init"], busybox, map(ramdisk.module, order))
    (lab / "guest.img").write_bytes(guest)
    drivers = ramdisk.load_order(modules, DRIVERS)
    (lab / "drivers.img").write_bytes(ramdisk.drivers(map(ramdisk.module, drivers)))
    shutil.copy(work / "vmlinux", lab)
    shutil.copy(kernel, lab / "vmlinuz")  # packed, as QEMU's direct kernel boot wants it
    for kind in architecture.guests:
        (lab / kind).mkdir()
        for name, memory in architecture.sizes.items():
            text = guest_config(baked[f"{kind}.cfg"].decode(), name=name, memory=memory)
            (lab / kind / f"{name}.cfg").write_text(text)
    for unused in (modules, tree / "boot"):
        shutil.rmtree(unused)


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        start_new_session=True,  # on Ctrl-C it is we who stop it, and clean up
    )
    if done.returncode != 0:
        text = f"status {done.returncode} of: {' '.join(command)}\n"
        text += "\n".join(done.stdout.splitlines()[-15:])
        if "NO_PUBKEY" in text:  # never answered with an unauthenticated build
            text += "\n(older than that Debian: upgrade this machine's debian-archive-keyring)"
        raise LabUnavailableError(text)
