"""Fixtures that many tests share, and every tolerance by name.

A tolerance is the largest difference that a contract allows, never what a run happened to show; do not loosen one to
make a fix pass.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import made
from tests.driver import drive as drive  # a fixture

pytest_plugins = ["tests.fault_table", "tests.skips"]

# Sum order of a float32 loss over a few dozen rows: gradients on two ranks against one process.
LOSS_TOLERANCE = 1e-6
# Training on one CPU thread in fp32 has no freedom of order between a run and its resumption: equal to the last bit.
RESUME_LOSS_TOLERANCE = 0.0
# clip_score is a float32 sum of products; float16 rows have 11 bits.
CLIP_SCORE_TOLERANCE = 1e-5
# The norm of a unit row after rounding to float16: each of d entries is off by 2**-11 relative.
STORED_NORM_TOLERANCE = 1e-3
# cuDNN and oneDNN order the same float32 sums differently.
GPU_FP32_TOLERANCE = 1e-4
# float16 activations: 11 bits through a dozen layers.
GPU_FP16_TOLERANCE = 2e-2

hypothesis.settings.register_profile(
    "clipgap",
    deadline=None,  # two cores shared with others
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("clipgap")


@pytest.fixture(scope="session", autouse=True)
def _download_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of remote files go nowhere near the home directory, of workers neither."""
    os.environ["CLIPGAP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _no_figures_left() -> Iterator[None]:
    """Figures that a test looks at and does not save are closed: pyplot warns of many, whoever opens the last."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session", autouse=True)
def _ray_temp_dir() -> Iterator[None]:
    """Ray's test cluster notes its address under RAY_TMPDIR, in a folder that it does not make; else in /tmp/ray."""
    folder = tempfile.mkdtemp(prefix="cg-tmp-", dir="/tmp")
    os.mkdir(f"{folder}/ray")
    os.environ["RAY_TMPDIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray for the whole session, in a short directory (unix sockets allow 107 characters)."""
    import ray

    from clipgap_ray.stages.session import connect

    folder = tempfile.mkdtemp(prefix="cg-ray-", dir="/tmp")
    os.environ["CLIPGAP_RAY_TMP"] = folder
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one into the home directory
    os.environ.pop("RAY_ADDRESS", None)
    connect()
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> made.World:
    """A rendered world of 600 pool rows with every fault, and its truth."""
    return made.render_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_embeddings(tiny_world: made.World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The world's pool, reference and three test sets, embedded by projection without Ray: name -> folder."""
    folder = tmp_path_factory.mktemp("embeddings")
    sources = {"pool": "pool", "reference": "reference", **{name: f"tests/{name}" for name in made.TESTS}}
    return {name: made.embed_without_ray(tiny_world.path(place), str(folder / name)) for name, place in sources.items()}


@pytest.fixture(scope="session")
def tiny_scores(ray_session: None, tiny_embeddings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scores of the tiny pool against its three test sets, thresholds from the reference, one part per task."""
    from clipgap_ray.config.score import ScoreSettings
    from clipgap_ray.stages import score

    out: Path = tmp_path_factory.mktemp("scores") / "all"
    score.run(ScoreSettings(**made.score_words(tiny_embeddings), out=str(out), group_bytes=1, query_share=1e9))
    return str(out)
