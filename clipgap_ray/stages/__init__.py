"""Where the work runs: the only library code that touches Ray Data, Core and Train. One file per stage.

Every stage is `run(settings) -> Summary`: it checks its input, takes the lease of its output directory, computes
the parts that are not committed yet, and writes manifest and summary. The maths is in `clipgap_ray.kernels`.
"""
