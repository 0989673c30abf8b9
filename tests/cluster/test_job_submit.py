"""`ray job submit` for real: a local head of our own, the working directory uploaded, a stage run as a job."""

import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.shards import write_tar

ROOT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_DEADLINE_S = 120

pytestmark = pytest.mark.cluster


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A head on free ports with its own temp dir and token; ended by its own process id."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    gcs, dashboard = _free_port(), _free_port()
    temp = tempfile.mkdtemp(prefix="cg-")
    process = subprocess.Popen(
        [
            *RAY, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=4", "--object-store-memory=200000000",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--temp-dir={temp}", "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_DEADLINE_S
    while subprocess.run([*RAY, "job", "list", "--address", address], env=environment, capture_output=True).returncode:
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "the job server did not come up"
    yield address, environment
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def _submit(head, *words):
    address, environment = head
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)


def test_a_submitted_embed_job_writes_embeddings_and_resubmitting_resumes(head, tmp_path):
    _write_pool(tmp_path / "pool", shards=2)
    words = ["jobs/embed.py", str(tmp_path / "pool"), "--out", str(tmp_path / "emb"), "--model", "projection"]
    first = _submit(head, *words)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert EmbeddingSet.open(str(tmp_path / "emb")).num_rows == 20
    again = _submit(head, *words)
    assert again.returncode == 0
    assert '"parts_skipped": 2' in again.stdout


def test_a_failing_job_says_why_and_fails(head, tmp_path):
    result = _submit(
        head, "jobs/embed.py", str(tmp_path / "gone"), "--out", str(tmp_path / "e"), "--model", "projection"
    )
    assert result.returncode == 1
    assert "gone does not exist" in result.stdout + result.stderr


@pytest.mark.timeout(400)
def test_two_trainings_at_once_share_the_cluster_without_meeting(head, tmp_path):
    """Whatever a run leaves in Ray under a name, another run must not find: the heaviest stage, twice the same."""
    _write_pool(tmp_path / "pool", shards=2)
    words = ["jobs/train.py", "--source", str(tmp_path / "pool"), "--model", "conv-64-test", "--workers", "1"]
    words += ["--batch-size", "8", "--num-samples", "80", "--warmup", "2", "--checkpoint-every", "3"]
    with ThreadPoolExecutor(2) as pool:
        outs = [tmp_path / name for name in ("a", "b")]
        results = list(pool.map(lambda out: _submit(head, *words, "--out", str(out)), outs))
    for result in results:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    times = [[(out / name).stat().st_mtime for name in ("params.json", "checkpoint.pt")] for out in outs]
    assert max(began for began, _ in times) < min(ended for _, ended in times), "one waited for the other"
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"] for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _write_pool(folder, shards):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        samples = []
        for i in range(10):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
            samples.append((f"{shard:05d}{i:04d}", {"jpg": buffer.getvalue(), "txt": b"a caption"}))
        (folder / f"{shard:05d}.tar").write_bytes(write_tar(samples))
