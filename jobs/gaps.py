"""`ray job submit --working-dir . -- python jobs/gaps.py ...`: the same flags as `clipgap gaps`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["gaps", *sys.argv[1:]]))
