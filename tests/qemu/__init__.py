"""What went wrong in QEMU's map cache, tried here: docs/qemu-defects.md is the table."""
