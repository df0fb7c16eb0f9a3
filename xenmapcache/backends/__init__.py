"""Sources of guest memory, one file each; :func:`xenmapcache.open_backend` loads them by name."""
