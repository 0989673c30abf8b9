"""`ray job submit --working-dir . -- python jobs/cutout.py ...`: the same flags as `clipgap cutout`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["cutout", *sys.argv[1:]]))
