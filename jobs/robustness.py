"""`ray job submit --working-dir . -- python jobs/robustness.py ...`: the same flags as `clipgap robustness`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["robustness", *sys.argv[1:]]))
