"""`ray job submit --working-dir . -- python jobs/world.py ...`: the same flags as `clipgap world`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["world", *sys.argv[1:]]))
