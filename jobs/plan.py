"""`ray job submit --working-dir . -- python jobs/plan.py ...`: the same flags as `clipgap plan`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
