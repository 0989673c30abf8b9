"""clipgap_ray: how close is a training set to a test set, and does that closeness explain CLIP's accuracy?

The package is a set of stages (`clipgap_ray.stages`) around pure numerical kernels (`clipgap_ray.kernels`).
`CONTRIBUTING.md` shows the house; `clipgap --help` shows the commands.
"""

__version__ = "0.1.0"
