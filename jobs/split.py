"""`ray job submit --working-dir . -- python jobs/split.py ...`: the same flags as `clipgap split`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["split", *sys.argv[1:]]))
