"""`ray job submit --working-dir . -- python jobs/train.py ...`: the same flags as `clipgap train`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
