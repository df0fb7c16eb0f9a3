"""Every operation, interrupted at every point: what is promised must hold afterwards.

``table.py`` lists the operations, ``handlers.py`` what a signal's handler does in the middle of
one. ``python -m tests.interrupts OPERATION HANDLER POINT`` repeats a single point.
"""
