"""The world stage writes the bytes of the pure renderer, once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipgap_ray import store, world
from clipgap_ray.config.world import WorldSettings
from clipgap_ray.errors import StaleOutputError
from clipgap_ray.stages import world as stage
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_it_writes_the_renderer_s_bytes_and_renders_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(made.SPEC, rows=150, reference_rows=20, test_rows=12, counter_rows=1, faults=False, leak_rate=0.1)
    monkeypatch.setattr(world, "preset", lambda *_, seed, **__: replace(small, seed=seed))
    settings = WorldSettings(out=str(tmp_path / "stage"), seed=5)
    summary = stage.run(settings)
    direct = made.render_world(tmp_path / "direct", replace(small, seed=5))
    files = made.files_below(str(tmp_path / "stage"))
    for name, data in made.files_below(str(tmp_path / "direct")).items():
        assert files[name] == data, name
    assert store.read_table(str(tmp_path / "stage" / "truth.parquet")).to_pylist() == direct.truth
    assert summary.read == summary.kept == len(direct.truth)

    before = made.stamps_below(str(tmp_path / "stage" / "pool"))
    assert stage.run(settings).parts_skipped == summary.parts
    assert made.stamps_below(str(tmp_path / "stage" / "pool")) == before
    with pytest.raises(StaleOutputError, match="seed was 5, now 6"):
        stage.run(WorldSettings(out=str(tmp_path / "stage"), seed=6))
