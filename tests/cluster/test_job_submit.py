"""`ray job submit` for real: a local head of our own, the working directory uploaded, a stage run as a job."""

import io
import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.shards import write_tar
from tests import local_head
from tests.local_head import RAY, ROOT, SECRET
from tests.waiting import until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head():
    with local_head.running() as started:
        yield started


def _job(head, verb, *words, **env):
    command = [*RAY, "job", verb, "--address", head.address, *words]
    environment = {**head.environment, **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)


def _submit(head, *words, options=()):
    return _job(head, "submit", "--working-dir", str(ROOT), *options, "--", sys.executable, *words)


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


@pytest.mark.timeout(400)
def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(head, tmp_path):
    _write_pool(tmp_path / "pool", shards=2)
    out, steps = tmp_path / "run", 400
    words = ["jobs/train.py", "--source", str(tmp_path / "pool"), "--model", "conv-64-test", "--workers", "1"]
    words += ["--batch-size", "4", "--num-samples", str(4 * steps), "--warmup", "2", "--checkpoint-every", "20"]
    words += ["--out", str(out)]
    assert _submit(head, *words, options=("--no-wait", "--submission-id", "stopped")).returncode == 0
    until(lambda: list(out.glob("train/checkpoint_*")), "the first checkpoint", seconds=120)
    stopped = _job(head, "stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "was stopped" in _job(head, "status", "stopped").stdout
    assert not (out / "manifest.json").exists()
    again = _submit(head, *words)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert json.loads((out / "summary.json").read_text())["starts"][-1] > 0, "it began anew"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [row["step"] for row in rows]
    assert seen == sorted(set(seen)), "a step twice"
    assert seen[-1] == steps
    assert (out / "manifest.json").exists()


def test_another_token_is_refused(head):
    refused = _job(head, "list", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode != 0
    assert "authentication" in (refused.stdout + refused.stderr).lower()


def test_no_secret_of_the_nodes_is_written_anywhere(head, tmp_path_factory):
    """After the jobs above: outputs, logs of jobs and of Ray, and what the job server shows."""
    shown = _job(head, "list")
    written = [shown.stdout.encode(), shown.stderr.encode()]
    read = 0
    for root in (Path(head.temp), tmp_path_factory.getbasetemp()):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                written.append(path.read_bytes())
                read += 1
    assert read > 20
    for secret in (SECRET, head.environment["RAY_AUTH_TOKEN"]):
        assert not any(secret.encode() in text for text in written)


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
