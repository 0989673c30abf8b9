"""`ray job submit --working-dir . -- python jobs/discover.py ...`: the same flags as `clipgap discover`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["discover", *sys.argv[1:]]))
