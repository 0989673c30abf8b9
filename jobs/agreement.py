"""`ray job submit --working-dir . -- python jobs/agreement.py ...`: the same flags as `clipgap agreement`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["agreement", *sys.argv[1:]]))
