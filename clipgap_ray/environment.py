"""What is installed here, and the one thing that must be right: exactly one FAISS."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from clipgap_ray.errors import ConfigError

FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
REPORTED = ("ray", "torch", "torchvision", "open_clip_torch", "pyarrow", "numpy", "pydantic", "fastapi", "timm")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def require_one_faiss() -> str:
    """Return the one FAISS wheel that is installed.

    Raises:
        ConfigError: If none or several are: they install the same module over each other.
    """
    found = installed(FAISS_WHEELS)
    if len(found) != 1:
        what = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
        raise ConfigError(
            f"FAISS wheels installed: {what}; expected exactly one",
            hint="pip uninstall all of them, then pip install 'clipgap-ray[cpu]' (or '[gpu]' on CUDA machines)",
        )
    return next(iter(found))


def describe() -> dict[str, Any]:
    """Return what `clipgap doctor` prints; every check is a value, problems are listed under `problems`."""
    problems = []
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        **installed(REPORTED),
    }
    try:
        report["faiss"] = require_one_faiss()
    except ConfigError as error:
        problems.append(str(error))
    try:
        import torch
        import torchvision  # noqa: F401  a torchvision built for another torch fails here: `torchvision::nms`

        report["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except (ImportError, RuntimeError) as error:
        problems.append(f"torch and torchvision do not fit: {error}\nhint: install both from the constraints file")
    report["problems"] = problems
    return report
