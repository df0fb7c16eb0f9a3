"""The lab by hand: `python -m tests.xen.lab build|boot|shell|machines`."""

from __future__ import annotations

import argparse
import sys
import time

from .boot import LabError, Machine
from .image import image
from .platform import DEFAULT, PLATFORMS
from .prerequisites import LabUnavailableError


def main() -> int:
    """Build an image; boot it, and print its console or give it as a shell; or list machines."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.lab", description=__doc__)
    parser.add_argument("command", choices=("build", "boot", "shell", "machines"))
    parser.add_argument("--xen", choices=sorted(PLATFORMS), default=DEFAULT)
    arguments = parser.parse_args()
    if arguments.command == "machines":
        sys.stdout.write("".join(f"{name}\n" for name in PLATFORMS))
        return 0
    try:
        started = time.monotonic()
        built = image(PLATFORMS[arguments.xen])
        sys.stdout.write(f"image {built.folder} ({time.monotonic() - started:.0f} s)\n")
        sys.stdout.flush()
        if arguments.command == "shell":
            with Machine(built, mode="shell") as machine:
                return machine.wait()
        if arguments.command == "boot":
            started = time.monotonic()
            with Machine(built, echo=sys.stdout.fileno()) as machine:
                for line in machine.lines(deadline=600, idle=120):
                    sys.stdout.write(f"[{time.monotonic() - started:5.1f} s] {line}\n")
                    sys.stdout.flush()
            sys.stdout.write(f"powered off after {time.monotonic() - started:.0f} s\n")
    except (LabUnavailableError, LabError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
