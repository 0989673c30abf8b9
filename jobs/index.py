"""`ray job submit --working-dir . -- python jobs/index.py ...`: the same flags as `clipgap index`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))
