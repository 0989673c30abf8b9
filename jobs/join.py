"""`ray job submit --working-dir . -- python jobs/join.py ...`: the same flags as `clipgap join`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["join", *sys.argv[1:]]))
