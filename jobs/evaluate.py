"""`ray job submit --working-dir . -- python jobs/evaluate.py ...`: the same flags as `clipgap evaluate`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
