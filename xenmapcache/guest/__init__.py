"""Typed access to guest memory, on top of a map cache."""

from .memory import GuestMemory

__all__ = ["GuestMemory"]
