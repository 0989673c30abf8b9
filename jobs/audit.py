"""`ray job submit --working-dir . -- python jobs/audit.py ...`: the same flags as `clipgap audit`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
