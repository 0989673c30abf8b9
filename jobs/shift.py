"""`ray job submit --working-dir . -- python jobs/shift.py ...`: the same flags as `clipgap shift`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["shift", *sys.argv[1:]]))
