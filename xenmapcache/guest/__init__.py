"""Typed access to guest memory, on top of a map cache."""

from .memory import GuestMemory
from .scatter import Pieces, Segments

__all__ = ["GuestMemory", "Pieces", "Segments"]
