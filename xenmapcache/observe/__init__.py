"""What is made of events: the analysis of QEMU's logs."""
