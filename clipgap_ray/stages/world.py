"""Render the miniature world: one Ray task per unit (a tar, or a class folder), files written atomically.

Rendering is a pure function of (spec, unit), so a unit that died is rendered again to the same bytes.

Writes: the files of `clipgap_ray.world` below `out`, and truth.parquet. Unit of restart: the world's unit.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray

from clipgap_ray import rundir, store, world
from clipgap_ray.config.world import WorldSettings
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded


def run(settings: WorldSettings) -> rundir.Summary:
    """Render a world; running again renders only the units that are missing."""
    spec = world.preset(
        settings.preset,
        rows=settings.rows,
        seed=settings.seed,
        faults=settings.faults,
        correlation=settings.correlation,
        kind=settings.kind,
    )
    units = world.units(spec)
    guarded = settings.fingerprint()
    guarded.pop("out")
    with rundir.RunDirectory(settings.out, "world", guarded) as directory:
        todo = [number for number in range(len(units)) if number not in directory.log.records]
        if todo:  # a finished world does not start a cluster
            connect()
        progress = Progress("world", len(units), "units", done=len(units) - len(todo))
        render = ray.remote(num_cpus=1)(_render)
        for record in bounded(lambda number: render.remote(spec, units[number], number, directory.uri), todo):
            directory.log.append([record])
            progress.advance(rows=record["rows"])
        progress.close()
        truth = pa.concat_tables(store.read_table(_truth_path(directory.uri, number)) for number in range(len(units)))
        store.write_table(directory.path("truth.parquet"), truth)
        return directory.finish({"rows": truth.num_rows}, rows=truth.num_rows)


def _truth_path(uri: str, number: int) -> str:
    return store.join(uri, "truth", f"unit_{number:05d}.parquet")


def _render(spec: Any, unit: Any, number: int, uri: str) -> dict[str, Any]:
    rendered = world.render(spec, unit)
    for name, data in rendered.files.items():
        store.write_bytes(store.join(uri, name), data)
    store.write_table(_truth_path(uri, number), rendered.truth)
    rows = rendered.truth.num_rows
    files = {name: store.sha256(data) for name, data in rendered.files.items()}
    return {"part": number, "rows": rows, "read": rows, "kept": rows, "files": files}
