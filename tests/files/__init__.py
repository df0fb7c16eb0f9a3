"""Files on this machine: read, mapped under a file lease, indexed, and written."""
