"""The images by hand: ``python -m tests.images.lab`` makes them, and prints where they are."""

from __future__ import annotations

import sys

from tests.xen.lab.prerequisites import LabUnavailableError

from . import FORMS, images


def main() -> int:
    """Make the images unless they exist, and list them."""
    try:
        made = images()
    except LabUnavailableError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{made.folder}\n")
    for form in FORMS:
        size = (
            f"{made.path(form.file).stat().st_size:>11}" if made.has(form.file) else "   (absent)"
        )
        sys.stdout.write(f"{size}  {form.file:24} {form.what}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
