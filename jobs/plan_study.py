"""`ray job submit --working-dir . -- python jobs/plan_study.py ...`: the same flags as `clipgap plan-study`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan-study", *sys.argv[1:]]))
