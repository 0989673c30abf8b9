"""`ray job submit --working-dir . -- python jobs/score.py ...`: the same flags as `clipgap score`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
