"""Device models in Python: an ioreq server over live Xen or over the mock."""

from .regions import Device, Region
from .server import IoreqServer

__all__ = ["Device", "IoreqServer", "Region"]
