"""What could end the interpreter or leak, each in a process of its own."""
