"""The command ``xenmapcache``."""
