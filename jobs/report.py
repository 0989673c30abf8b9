"""`ray job submit --working-dir . -- python jobs/report.py ...`: the same flags as `clipgap report`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
