"""The processors that Xen's guests run on, as data: x86-64 and arm64."""

from __future__ import annotations

from typing import Final, NamedTuple


class Architecture(NamedTuple):
    """What differs between guests of one processor and of another. Immutable.

    Attributes:
        name: ``"x86-64"`` or ``"arm64"``.
        machines: what the kernel of such a machine calls itself (``uname -m``).
        fence_code: machine code of a C function that is a full memory fence. Empty if other
            processors see a thread's loads and stores in program order.
        mmio_only: Xen sends a device model device memory only: no ports, no PCI configuration
            space, no buffered requests.
    """

    name: str
    machines: tuple[str, ...]
    fence_code: bytes
    mmio_only: bool


# x86 needs no fence. The processor delays only a load that follows a store to another address
# (TSO), and no step of a request depends on that order. CPython makes each load and store of a
# shared page in a C call of its own, which the compiler cannot reorder.
X86_64: Final = Architecture("x86-64", ("x86_64", "i386", "i686"), b"", mmio_only=False)
ARM64: Final = Architecture(
    "arm64",
    ("aarch64",),
    bytes.fromhex("bf3b03d5 c0035fd6"),  # dmb ish; ret
    mmio_only=True,
)
ARCHITECTURES: Final = {architecture.name: architecture for architecture in (X86_64, ARM64)}
