"""`ray job submit --working-dir . -- python jobs/embed.py ...`: the same flags as `clipgap embed`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
