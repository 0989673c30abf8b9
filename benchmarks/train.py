"""The training step beside torchrun and open_clip's own program, and a virtual split against a copy of it.

`ray`: two gloo workers, alternating blocks, samples/s after the first third of a block: start-up and warm-up are
left out (Ray Train starts actors of its own in the first ten seconds of training). `torchrun` is the same model, plan
and step function (`train_loop.run_steps`) without Ray, compared with itself, too; `open_clip` is open_clip_train.main
on the same shards, model, batch and number of samples, one loader process per rank (needs webdataset of at most 0.2.86
and braceexpand: `pip install --no-deps --target peer webdataset==0.2.86 braceexpand`, and `--peer peer`).
`split`: one process on half of a pool where it lies, and on a copy of that half; with training, and the loader alone.

    python benchmarks/train.py ray [--model conv-64] [--steps 400] [--blocks 5]
    python benchmarks/train.py split [--images 2000] [--size 256] [--blocks 5]
"""

import argparse
import io
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from PIL import Image

from clipgap_ray import filesystems, schema
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.encoder import register_models
from clipgap_ray.shards import write_tar
from clipgap_ray.stages import train
from clipgap_ray.stages.train_data import Plan, batches
from clipgap_ray.stages.train_loop import run_steps
from clipgap_ray.stages.train_model import build_model, make_optimizer
from clipgap_ray.stages.train_plan import make_plan

SHARDS = 8
IMAGE_SIZE = 64
COMPARED = (
    ("torchrun", "Ray Train"),
    ("torchrun", "torchrun again"),
    ("open_clip", "Ray Train"),
    ("copy, training", "virtual split, training"),
    ("copy, loader alone", "virtual split, loader alone"),
)


def write_pool(folder: Path, images: int, size: int, keep: Callable[[int], bool] = lambda number: True) -> list[str]:
    """Write shards of smooth JPEGs with uids and captions; returns the uids."""
    uids = []
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        samples = []
        for number in range(shard, images, SHARDS):
            uid = f"{number * 2654435761 % 2**32:032x}"
            if not keep(number):
                continue
            small = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            caption = f"picture {number}"
            fields = json.dumps({"uid": uid, "caption": caption}).encode()
            samples.append((f"{number:08d}", {"jpg": buffer.getvalue(), "txt": caption.encode(), "json": fields}))
            uids.append(uid)
        (folder / f"{shard:05d}.tar").write_bytes(write_tar(samples))
    return uids


def rate(rows: list[dict]) -> float:
    """samples/s of a block after its warm-up, from its rows of metrics."""
    return warm_rate([(row["samples"] / row["samples_per_s"], row["samples"]) for row in rows])


def warm_rate(seen: list[tuple[float, int]]) -> float:
    """samples/s from the first (second, samples so far) after a third of the samples to the last."""
    (begun, first), (ended, last) = next(at for at in seen if 3 * at[1] >= seen[-1][1]), seen[-1]
    return (last - first) / (ended - begun)


def torchrun_worker(plan_path: str, out: str) -> None:
    """Run the loop of one rank under torchrun."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    plan: Plan = pickle.loads(Path(plan_path).read_bytes())
    model = torch.nn.parallel.DistributedDataParallel(build_model(plan.settings, 0), gradient_as_bucket_view=True)
    rows: list[dict] = []
    run_steps(
        plan, model, make_optimizer(model, plan.settings), batches(plan, rank, world_size, 0), 0, rank, world_size,
        torch.device("cpu"), lambda step, row: rows.append(row) if row else None,
    )  # fmt: skip
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def open_clip_worker(flags: list[str]) -> None:
    """Run one rank of open_clip's program, which names DDP a device: torch refuses that on CPUs."""
    from open_clip_train.main import main as open_clip_main

    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids=None, **words: ddp(model, **words)  # type: ignore[assignment, misc]
    register_models()
    open_clip_main(flags)


def open_clip_rate(options: argparse.Namespace, pool: Path, out: Path) -> float:
    """samples/s of open_clip's program after its warm-up, from when its lines come."""
    words = {
        "train-data": f"{pool}/{{{0:05d}..{SHARDS - 1:05d}}}.tar", "dataset-type": "webdataset",
        "train-num-samples": 64 * options.steps, "model": options.model, "batch-size": 32, "workers": 1, "epochs": 1,
        "precision": "fp32", "device": "cpu", "dist-backend": "gloo", "log-every-n-steps": 10, "save-frequency": 0,
        "logs": out, "name": "run",
    }  # fmt: skip
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    flags += ["--local-loss", "--gather-with-grad", "--skip-scheduler"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [options.peer, os.environ.get("PYTHONPATH")]))
    seen, said = [], []
    command = [*LAUNCHER, __file__, "open_clip", json.dumps(flags)]  # torchrun takes --logs for one of its own
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        for line in run.stdout or ():
            said.append(line)
            found = re.search(r"Train Epoch: 0 \[ *(\d+)/", line)
            if found:
                seen.append((time.perf_counter(), int(found[1])))
    if run.returncode or len(seen) < 2:
        sys.exit(f"open_clip_train failed:\n{''.join(said)[-3000:]}")
    return warm_rate(seen)


def against_torchrun(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Alternate runs of Ray Train, two of torchrun, and one of open_clip's program."""
    write_pool(folder / "pool", options.images, 80)
    words = {
        "source": f"{folder}/pool", "samples": f"{folder}/samples", "model": options.model, "batch_size": 32,
        "workers": 2, "num_samples": 64 * options.steps, "checkpoint_every": 10**6, "report_to": (),
    }  # fmt: skip
    rates: dict[str, list[float]] = {"torchrun": [], "Ray Train": [], "torchrun again": [], "open_clip": []}
    for block in range(options.blocks):
        for name in rates:
            out = folder / f"{block}-{name.replace(' ', '-')}"
            settings = TrainSettings(**words, out=str(out))
            if name == "open_clip":
                rates[name].append(open_clip_rate(options, folder / "pool", out))
                continue
            if name == "Ray Train":
                train.run(settings)
                rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            else:
                plan, _ = make_plan(settings, str(out), IMAGE_SIZE)
                out.mkdir(exist_ok=True)
                (out / "plan.pkl").write_bytes(pickle.dumps(plan))
                work = [__file__, "worker", str(out / "plan.pkl"), str(out / "rows.json")]
                subprocess.run([*LAUNCHER, *work], check=True, capture_output=True)
                rows = json.loads((out / "rows.json").read_text())
            rates[name].append(rate(rows))
    return rates


def against_a_copy(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Alternate blocks on half of a pool and on a copy of that half, in this process."""
    torch.set_num_threads(1)
    half = write_pool(folder / "copy", options.images, options.size, lambda number: number % 2 == 0)
    write_pool(folder / "pool", options.images, options.size)
    np.save(folder / "half.npy", np.sort(schema.pack_uids(half)))
    words = {
        "model": options.model, "batch_size": 32, "workers": 1, "num_samples": 32 * options.steps, "out": str(folder),
    }  # fmt: skip
    places = {
        "copy": {"source": f"{folder}/copy", "samples": f"{folder}/samples-copy"},
        "virtual split": {
            "source": f"{folder}/pool",
            "samples": f"{folder}/samples-pool",
            "split": f"{folder}/half.npy",
        },
    }
    plans = {
        name: make_plan(TrainSettings(**words, **place), str(folder), IMAGE_SIZE)[0] for name, place in places.items()
    }
    rates: dict[str, list[float]] = {f"{name}, {what}": [] for what in ("training", "loader alone") for name in plans}
    for block in range(options.blocks + 1):  # the first one warms up
        for name, plan in plans.items():
            started = time.perf_counter()
            for _ in batches(plan, 0, 1, 0):
                pass
            loader = plan.steps * 32 / (time.perf_counter() - started)
            model = build_model(plan.settings, 0)
            rows: list[dict] = []
            run_steps(
                plan, model, make_optimizer(model, plan.settings), batches(plan, 0, 1, 0), 0, 0, 1,
                torch.device("cpu"), lambda step, row, rows=rows: rows.append(row) if row else None,
            )  # fmt: skip
            if block:
                rates[f"{name}, loader alone"].append(loader)
                rates[f"{name}, training"].append(rate(rows))
    return rates


def main() -> None:
    """Run the blocks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("ray", "split"), default="split")
    parser.add_argument("--model", default="conv-64")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--peer", default="", help="a folder with the webdataset that open_clip's program needs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(filesystems.filesystem(name)[1])
        rates = against_torchrun(options, folder) if options.what == "ray" else against_a_copy(options, folder)
    print(
        f"{options.model}, {options.steps} steps a block, {options.blocks} blocks; medians of samples/s (least to most)"
    )
    for what, values in rates.items():
        print(f"{what:28} {statistics.median(values):8.1f}  ({min(values):.1f} to {max(values):.1f})")
    for one, other in COMPARED:
        if one in rates:
            pairs = [b / a for a, b in zip(rates[one], rates[other], strict=True)]
            print(f"{other} / {one}: {statistics.median(pairs):.3f}  ({min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        torchrun_worker(*sys.argv[2:])
    elif sys.argv[1:2] == ["open_clip"]:
        open_clip_worker(json.loads(sys.argv[2]))
    else:
        main()
