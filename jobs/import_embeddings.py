"""`ray job submit --working-dir . -- python jobs/import_embeddings.py ...`: the same flags as `clipgap import`."""

import sys

from clipgap_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
