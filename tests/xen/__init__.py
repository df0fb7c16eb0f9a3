"""The tests that need a real Xen, and the lab that provides one."""
