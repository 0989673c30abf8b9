"""Embedding beside its peers, on the same tars and the same weights in one run.

    python benchmarks/embed.py                                    # encoder-bound: ViT-B/32, 256 px JPEGs
    python benchmarks/embed.py --model projection                 # decode-bound
    python benchmarks/embed.py --preprocess                       # images per core-second of decoding alone
    python benchmarks/embed.py --memory 200000                    # memory of every process over the images

What is compared: the ideal (decode and preprocess alone, encoder alone, on data in memory, in CPU-seconds per image, on
all cores at once; for one core while the others idle it is printed, too), `clipgap embed` (and with `--decode fast`),
the textbook Ray Data pipeline, and clip-retrieval's inference in an environment of its own:

    python -m venv cr && cr/bin/pip install clip-retrieval==2.45.0 "setuptools<70"
    python benchmarks/embed.py --clip-retrieval cr/bin/clip-retrieval

Everybody runs twice a round, over few and over many images; the difference is without start-up, if the few already fill
every worker (eight shards do: a process costs 2.4 CPU-seconds before its first image). CPU-seconds are those
of all processes of a competitor; `rate` is cores / (CPU-seconds per image), `wall` is what the clock said. A busy
machine changes the first less than the second, but it does: Ray's processes poll while they wait. Use a quiet one.
Competitors alternate; the table shows the median and the range.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from PIL import Image

from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.pixels import Preprocess
from clipgap_ray.shards import write_tar

CAPTION = "a photograph of a small boat on a quiet lake in the evening, number {}"
IDEAL_S = 3.0  # of each half of the ideal, at least
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def photograph(short: int, seed: int) -> bytes:
    """A 4:3 JPEG with the spectrum of photographs, amplitude 1/frequency."""
    width, height = short * 4 // 3, short
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((height, width, 3)), axes=(0, 1))
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None]
    noise = np.fft.irfft2(spectrum / (np.hypot(y, x) + 1 / width), s=(height, width), axes=(0, 1))
    buffer = io.BytesIO()
    pixels = np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def write_shards(folder: Path, rows: int, per_shard: int, images: list[bytes]) -> str:
    """Tars of `per_shard` rows; returns their folder."""
    folder.mkdir(parents=True)
    for start in range(0, rows, per_shard):
        numbers = range(start, min(start + per_shard, rows))
        samples = [(f"{n:09d}", {"jpg": images[n % len(images)], "txt": CAPTION.format(n).encode()}) for n in numbers]
        (folder / f"{start // per_shard:05d}.tar").write_bytes(write_tar(samples))
    return str(folder)


# --- measuring -------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Seconds by the clock, CPU-seconds of all processes, and memory by process over time."""

    wall_s: float
    cpu_s: float
    memory: list[tuple[float, str, int, int]] = field(default_factory=list)  # (seconds, title, pid, bytes)


def measure(command: list[str], *, every_s: float = 0.2) -> Cost:
    """Run a command and watch every process that inherits its environment."""
    mark = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="cg-bench-", dir="/tmp")
    env = {**os.environ, "BENCHMARK_MARK": mark, "CLIPGAP_RAY_TMP": folder, "CUDA_VISIBLE_DEVICES": ""}
    cpu: dict[int, float] = {}
    memory: list[tuple[float, str, int, int]] = []
    started, stop = time.perf_counter(), threading.Event()

    def look() -> None:
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or mark.encode() not in (entry / "environ").read_bytes():
                    continue
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()[:60]
            except OSError:
                continue
            pid = int(entry.name)
            cpu[pid] = (int(words[11]) + int(words[12])) / TICKS
            memory.append((time.perf_counter() - started, title, pid, int(words[21]) * PAGE))

    def watch() -> None:
        while not stop.wait(every_s):
            look()

    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    said = process.communicate()[0]
    wall = time.perf_counter() - started
    stop.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return Cost(wall, sum(cpu.values()), memory)


def usual_transform(size: int) -> Callable[[Image.Image], np.ndarray]:
    """What everybody does to a picture before it is a tensor: torchvision's resize and crop, by Pillow."""
    from torchvision import transforms

    both = transforms.Compose(
        [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    return lambda picture: np.asarray(both(picture))


def ideal(images: list[bytes], settings: EncoderSettings, processes: int) -> tuple[float, float, float]:
    """CPU-seconds per image on data in memory: decoding and preprocessing, encoding image and caption, usual decoding.

    So many processes do the same at once: cores share caches and memory, and a run has all of them busy.
    """
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_ideal, args=(images, settings, together, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    decode, encode, usual = (statistics.mean(column) for column in zip(*found, strict=True))
    return decode, encode, usual


def _ideal(images: list[bytes], settings: EncoderSettings, together: Barrier, results: Queue) -> None:
    import torch

    torch.set_num_threads(1)
    encoder = settings.build()
    exact, batch = Preprocess(encoder.preprocess.size), settings.batch_size
    some = [images[n % len(images)] for n in range(batch)]
    pixels = np.stack([exact.decode(image) for image in some])
    captions = [CAPTION.format(n) for n in range(batch)]

    def encode() -> None:
        encoder.encode_images(pixels)
        encoder.encode_texts(captions)

    transform = usual_transform(encoder.preprocess.size)

    def usual() -> None:
        for image in some:
            transform(Image.open(io.BytesIO(image)).convert("RGB"))

    found = []
    for work in (lambda: [exact.decode(image) for image in some], encode, usual):
        work()  # loads what is loaded late
        together.wait()
        count, started = 0, time.process_time()
        while (spent := time.process_time() - started) < IDEAL_S:
            work()
            count += batch
        found.append(spent / count)
    results.put(tuple(found))


# --- competitors (each in a process of its own) ------------------------------------------------------------


def child_clipgap(source: str, out: str, model: str, weights: str, batch: str, decode: str) -> None:
    """`clipgap embed`."""
    from clipgap_ray.cli import main

    words = ["embed", source, "--out", out, "--model", model, "--batch-size", batch, "--decode", decode, "--yes"]
    sys.exit(main([*words, *(["--pretrained", weights] if weights else [])]))


def child_textbook(source: str, out: str, model: str, weights: str, batch: str) -> None:
    """The pipeline of Ray Data's own examples: read, transform row by row, encode in actors, write parquet."""
    import ray
    import torch

    from clipgap_ray.stages.session import connect

    connect()
    settings = EncoderSettings(model, weights, batch_size=int(batch))
    transform: Callable[[Image.Image], np.ndarray]
    if model == "projection":
        transform = usual_transform(64)
    else:
        import open_clip

        clip_transform = open_clip.image_transform(224, is_train=False)
        transform = lambda picture: clip_transform(picture).numpy()  # noqa: E731

    class Model:
        def __init__(self) -> None:
            self.encoder = settings.build()

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if model == "projection":
                images = self.encoder.encode_images(np.stack(list(batch["image"])))
            else:
                with torch.inference_mode():
                    pixels = torch.from_numpy(np.stack(list(batch["image"])))
                    features = torch.nn.functional.normalize(self.encoder.model.encode_image(pixels), dim=-1)  # type: ignore[attr-defined]
                    images = features.numpy()
            texts = self.encoder.encode_texts(list(batch["text"]))
            return {"key": batch["key"], "image": images, "text": texts}

    def prepare(row: dict[str, object]) -> dict[str, object]:
        picture = row["jpg"] if isinstance(row["jpg"], Image.Image) else Image.fromarray(np.asarray(row["jpg"]))
        return {"key": row["__key__"], "image": transform(picture.convert("RGB")), "text": row["txt"]}

    paths = sorted(str(path) for path in Path(source).glob("*.tar"))
    dataset = ray.data.read_webdataset(paths, override_num_blocks=len(paths)).map(prepare)
    dataset.map_batches(Model, batch_size=int(batch), concurrency=os.cpu_count() or 1).write_parquet(out)


def competitors(options: argparse.Namespace, weights: str) -> dict[str, Callable[[str, str], list[str]]]:
    """Commands by name: (source, out) -> words."""
    me = [sys.executable, __file__, "--child"]
    batch = str(options.batch_size)

    def clip_retrieval(source: str, out: str) -> list[str]:
        shards = sorted(Path(source).glob("*.tar"))
        pattern = f"{source}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
        return [
            options.clip_retrieval, "inference", f"--input_dataset={pattern}", f"--output_folder={out}",
            "--input_format=webdataset", f"--clip_model=open_clip:{options.model}/{weights}", "--use_jit=False",
            f"--batch_size={batch}", "--num_prepro_workers=1", "--enable_metadata=False",
            f"--wds_number_file_per_input_file={options.per_shard}",
        ]  # fmt: skip

    found: dict[str, Callable[[str, str], list[str]]] = {
        "clipgap embed": lambda source, out: [*me, "clipgap", source, out, options.model, weights, batch, "exact"],
        "clipgap embed --decode fast": lambda source, out: [
            *me, "clipgap", source, out, options.model, weights, batch, "fast"
        ],
        "textbook Ray Data": lambda source, out: [*me, "textbook", source, out, options.model, weights, batch],
    }  # fmt: skip
    if options.model == "projection":
        print("clip-retrieval: skipped, it knows CLIP models only")
    elif not options.clip_retrieval or not Path(options.clip_retrieval).exists():
        print("clip-retrieval: skipped, no --clip-retrieval PROGRAM; see the head of this file")
    else:
        found["clip-retrieval"] = clip_retrieval
    return {name: words for name, words in found.items() if not options.only or name in options.only}


def compare(options: argparse.Namespace) -> None:
    """Alternating rounds of everybody, and the table."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        images = [photograph(options.short, seed) for seed in range(128)]
        sources = {rows: write_shards(Path(root, f"pool-{rows}"), rows, options.per_shard, images)
                   for rows in (options.few, options.many)}  # fmt: skip
        weights = ""
        if options.model != "projection":
            weights = str(Path(root, "weights.pt"))
            save_weights(options.model, weights)
        size = sum(map(len, images)) / len(images) / 1e3
        print(f"{options.model}, {options.few} and {options.many} JPEGs, short side {options.short} "
              f"({size:.0f} KB), {options.per_shard} a tar, {cores} cores, load {os.getloadavg()[0]:.0f}")  # fmt: skip
        lone: list[tuple[float, float, float]] = []
        best: list[tuple[float, float, float]] = []
        found: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.rounds):
            encoder = EncoderSettings(options.model, weights, batch_size=options.batch_size)
            lone.append(ideal(images, encoder, 1))
            best.append(ideal(images, encoder, cores))
            for name, words in competitors(options, weights).items():
                few, many = (
                    measure(words(sources[rows], str(Path(root, f"{name}-{rows}-{number}".replace(" ", "_")))))
                    for rows in (options.few, options.many)
                )
                rows = options.many - options.few
                each = (many.cpu_s - few.cpu_s) / rows, (many.wall_s - few.wall_s) / rows
                found.setdefault(name, []).append(each)
                print(f"round {number} {name}: {1e3 * each[0]:.2f} CPU-ms, "
                      f"{1e3 * each[1]:.2f} ms per image; load {os.getloadavg()[0]:.0f}", flush=True)  # fmt: skip
    for what, figures in (("one core, the others idle", lone), ("all cores at once", best)):
        decode, encode, usual = (statistics.median(column) for column in zip(*figures, strict=True))
        target = decode + encode
        print(f"ideal, {what}: decode {1e3 * decode:.2f} + encode {1e3 * encode:.2f} CPU-ms, "
              f"{cores / target:.1f} images/s; decode as torchvision does {1e3 * usual:.2f}")  # fmt: skip
    print("| | CPU-ms per image | rate, images/s | of the ideal | wall, images/s |\n|---|---:|---:|---:|---:|")
    for name, pairs in found.items():
        cpu = [1e3 * one[0] for one in pairs]
        middle = statistics.median(cpu)
        wall = statistics.median(1 / max(one[1], 1e-9) for one in pairs)
        print(f"| {name} | {middle:.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | {1e3 * cores / middle:.1f} "
              f"| {1e3 * target / middle:.2f} | {wall:.1f} |")  # fmt: skip


def save_weights(model: str, path: str) -> None:
    """Random weights that everybody loads."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), path)


# --- decoding alone, memory ----------------------------------------------------------------------------------


def preprocessing(rounds: int) -> None:
    """Images per core-second of open_clip's transform and of ours, alternating, and how far the rows are apart."""
    import open_clip
    import torch

    torch.set_num_threads(1)
    encoder = EncoderSettings("ViT-B-32", "random", batch_size=16).build()
    transform = open_clip.image_transform(224, is_train=False)
    ways: dict[str, Callable[[bytes], object]] = {
        "open_clip": lambda image: transform(Image.open(io.BytesIO(image))),
        "exact": Preprocess(224).decode,
        "fast": Preprocess(224, shrink_to=224).decode,
    }
    print("| short side | open_clip | exact | fast | exact / open_clip | fast / open_clip | cosine fast-exact, least |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for short in (256, 512):
        images = [photograph(short, seed) for seed in range(24)]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way(images[0])  # loads what is loaded late
        for _ in range(rounds):
            for name, way in ways.items():
                started = time.process_time()
                for image in images:
                    way(image)
                rates[name].append(len(images) / (time.process_time() - started))
        middle = {name: statistics.median(values) for name, values in rates.items()}
        exact, fast = (encoder.encode_images(np.stack([ways[name](i) for i in images])) for name in ("exact", "fast"))  # type: ignore[misc]
        cosine = float((exact * fast).sum(axis=1).min())
        columns = [f"{middle[name]:.0f} ({min(rates[name]):.0f} to {max(rates[name]):.0f})" for name in ways]
        print(f"| {short} | {' | '.join(columns)} | {middle['exact'] / middle['open_clip']:.2f} "
              f"| {middle['fast'] / middle['open_clip']:.2f} | {cosine:.4f} |", flush=True)  # fmt: skip


def over_time(options: argparse.Namespace) -> None:
    """Memory of the driver and of the workers while many images pass; a plot, and its growth in numbers."""
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        images = [photograph(options.short, seed) for seed in range(128)]
        source = write_shards(Path(root, "pool"), options.memory, options.per_shard, images)
        words = [sys.executable, __file__, "--child", "clipgap", source, str(Path(root, "emb")), "projection", ""]
        cost = measure([*words, str(options.batch_size), "exact"], every_s=2.0)
    titles: dict[int, list[str]] = {}
    for _, title, pid, _ in cost.memory:
        titles.setdefault(pid, []).append(title)
    usual = {pid: statistics.mode(own) for pid, own in titles.items()}  # Ray renames a worker with every task
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seconds, _, pid, size in cost.memory:
        lines.setdefault((usual[pid], pid), []).append((seconds, size / 1e6))
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for (title, pid), points in sorted(lines.items(), key=lambda item: -max(size for _, size in item[1])):
        seconds, sizes = zip(*points, strict=True)
        if seconds[-1] - seconds[0] < cost.wall_s / 4:
            continue
        half, end = sizes[len(sizes) // 2], sizes[-1]
        print(f"{title[:50]:<50} {pid:>8}  {min(sizes):7.0f} MB least {max(sizes):7.0f} most, {half:7.0f} half-way, "
              f"{end:7.0f} at the end")  # fmt: skip
        if max(sizes) > 150:
            axis.plot(seconds, sizes, label=f"{Path(title).name[:28]} {pid}", linewidth=1)
    axis.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None), title=f"{options.memory:,} images")
    axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(options.plot)
    print(f"{options.memory} images in {cost.wall_s:.0f} s, {cost.cpu_s:.0f} CPU-s; {options.plot}")


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name (random weights), or projection")
    parser.add_argument("--few", type=int, default=512, help="images of the short run")
    parser.add_argument("--many", type=int, default=1536, help="images of the long run")
    parser.add_argument("--batch-size", type=int, default=64, help="of everybody; images of a tar are a multiple of it")
    parser.add_argument("--per-shard", type=int, default=64)
    parser.add_argument("--short", type=int, default=256, help="short side of the JPEGs in pixels")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clip-retrieval", default="", help="its program, in an environment of its own")
    parser.add_argument("--only", nargs="*", help="these competitors only; any other word for the ideal alone")
    parser.add_argument("--preprocess", action="store_true", help="decoding alone")
    parser.add_argument("--memory", type=int, default=0, help="memory over so many images")
    parser.add_argument("--plot", default="embed-memory.svg", help="where --memory draws")
    parser.add_argument("--folder", default=None, help="where to write, default a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"clipgap": child_clipgap, "textbook": child_textbook}[options.child[0]](*options.child[1:])
    elif options.preprocess:
        preprocessing(max(3, options.rounds))
    elif options.memory:
        over_time(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
