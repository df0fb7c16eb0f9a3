"""``python -m xenmapcache`` is the command ``xenmapcache``."""

import sys

from xenmapcache_command import main

if __name__ == "__main__":
    sys.exit(main())
