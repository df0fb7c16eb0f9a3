"""File formats, parsed: content in, structures out. A parser opens no file and maps nothing.

A parser takes a :class:`.content.Content` and returns named tuples, or yields pairs of frame
numbers and file offsets. The backends make runs and indexes of them.
"""
