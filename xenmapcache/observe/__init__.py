"""What is made of events: recordings, pictures, metrics, a monitor, the analysis of QEMU's logs."""
