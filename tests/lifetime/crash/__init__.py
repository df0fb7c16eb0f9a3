"""The crash matrix: how guest memory is kept or used, and what happens during that.

``table.py`` says what becomes of each cell. ``__main__.py`` runs cells, each in a process of its
own that is forked off one which has imported everything and done nothing: a start of Python for
each would take minutes.
"""
