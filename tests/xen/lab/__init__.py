"""A real Xen with a real Dom0 and real guests, under QEMU's software emulation: no KVM."""
