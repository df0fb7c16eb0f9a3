"""Configurations of the lab's guests for ``xl``, which are made from one text for each type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

LAB: Final = Path("/lab")
"""In Dom0: the guests' files."""


Setting = str | int | list[str]


def guest_config(text: str, *, memory: int, extra: str = "", **settings: Setting) -> str:
    """Change settings of a configuration, or add them.

    Args:
        text: of the configuration.
        memory: MiB of RAM. What the guest has besides for its screen (``videoram``) is added.
        extra: to be appended to the kernel's command line.
        settings: the others, by their names.
    """
    settings |= {
        "memory": memory + screen(text),
        "extra": f"{_value(text, 'extra')} {extra}".strip(),
    }
    for name, value in settings.items():
        line = f"{name} = {json.dumps(value)}"
        kept = re.sub(rf"^{name}\s*=.*\n", "", text, flags=re.MULTILINE)
        text = f"{kept}{line}\n"
    return text


def made_config(guest: str, *, memory: int, extra: str = "", **settings: Setting) -> str:
    """In Dom0: the configuration of a guest of that type ("pvh", "hvm"), with other settings."""
    text = (LAB / guest / "guest.cfg").read_text()
    return guest_config(text, memory=memory, extra=extra, **settings)


def screen(text: str) -> int:
    """MiB that ``xl`` counts as a guest's memory, and that are not RAM."""
    return int(_value(text, "videoram") or 0)


def _value(text: str, name: str) -> str:
    found = re.search(rf'^{name}\s*=\s*"?(.*?)"?\s*$', text, re.MULTILINE)
    return found[1] if found else ""
