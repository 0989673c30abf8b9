"""`ray job submit --working-dir . -- python jobs/attributes.py ...`: the same flags as `clipgap attributes`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["attributes", *sys.argv[1:]]))
