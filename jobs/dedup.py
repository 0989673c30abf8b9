"""`ray job submit --working-dir . -- python jobs/dedup.py ...`: the same flags as `clipgap dedup`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["dedup", *sys.argv[1:]]))
