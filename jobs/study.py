"""`ray job submit --working-dir . -- python jobs/study.py ...`: the same flags as `clipgap run`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
