"""`clipgap status`: reads, never writes; safe beside a running job."""

from __future__ import annotations

from typing import Any

from clipgap_ray import filesystems, rundir, store
from clipgap_ray.config.study import StatusSettings
from clipgap_ray.errors import DataError

PREDICTED = ("seconds", "written_bytes", "driver_bytes", "worker_bytes")  # of a plan, to stand beside what was measured


def run(settings: StatusSettings) -> dict[str, Any]:
    """Return what is done in the directory of a stage, or of every stage below a study's directory.

    Raises:
        DataError: If nothing below the directory was written by us.
    """
    root = settings.directory.rstrip("/")
    found = {uri.removeprefix(root).lstrip("/") or ".": _stage(uri) for uri in _directories(root)}
    planned = store.join(root, "plan.json")  # of `clipgap plan-study --out`
    if store.exists(planned):
        for name, step in store.read_json(planned)["steps"].items():
            if name in found:
                found[name]["written_bytes"] = _bytes_below(store.join(root, name))
                found[name]["predicted"] = {what: step[what] for what in PREDICTED}
    if not found:
        raise DataError(f"{root} holds no stage's output", hint="give the --out directory of a command or a study")
    return {"directory": root, "stages": found}


def _directories(root: str) -> list[str]:
    """The directory itself, or those one and two levels below that a stage has written."""
    if store.exists(store.join(root, "settings.json")):
        return [root]
    below = [store.join(root, name) for name in store.list_names(root) if "." not in name]
    deeper = [store.join(uri, name) for uri in below for name in store.list_names(uri) if "." not in name]
    return [uri for uri in [*below, *deeper] if store.exists(store.join(uri, "settings.json"))]


def _bytes_below(uri: str) -> int:
    fs, path = filesystems.filesystem(uri)
    return int(filesystems.patiently(uri, lambda: fs.du(path)))


def _stage(uri: str) -> dict[str, Any]:
    settings = store.read_json(store.join(uri, "settings.json"))
    summary = rundir.Summary(settings.get("stage", "?"))
    for record in rundir.CommitLog(uri).records.values():
        summary.add(record)
    parts_path = store.join(uri, "parts.json")
    ended = store.join(uri, "summary.json")
    summed = store.read_json(ended) if store.exists(ended) else {}
    known = len(store.read_json(parts_path)) if store.exists(parts_path) else None
    return {
        "stage": summary.stage,
        "complete": store.exists(store.join(uri, "manifest.json")),
        "parts_done": summary.parts,
        "parts_known": known,
        "rows": summary.kept,
        "dropped": summary.dropped,
        "seconds": summed.get("working_seconds"),
        "driver_bytes": summed.get("driver_bytes"),
        "worker_bytes": summed.get("worker_bytes"),
    }
