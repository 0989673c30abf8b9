"""`ray job submit --working-dir . -- python jobs/export.py ...`: the same flags as `clipgap export`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
