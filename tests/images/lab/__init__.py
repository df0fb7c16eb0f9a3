"""Memory of a real Linux guest in every form that QEMU and makedumpfile write, made once.

QEMU emulates a small machine without KVM: Debian's cloud kernel (KASLR, page tables of five
levels) with 128 MiB. It is stopped, and its memory of that one moment is written in each form.
That takes about 15 seconds. The images are kept in a cache folder: the one that
XENMAPCACHE_IMAGES_CACHE names, else xenmapcache-images below the user's cache folder. They are
named after a hash of what makes them, so a change here makes new ones.

In tests, use the fixture ``lab_images`` and the marker ``images``; elsewhere ``lab.images()``.
By hand: ``python -m tests.images.lab``.
"""

from __future__ import annotations

from .cache import Images, cache_folder, images
from .forms import FORMS, Form

__all__ = ["FORMS", "Form", "Images", "cache_folder", "images"]
