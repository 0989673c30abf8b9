"""How much work the steps of a study are, from counts alone: the arithmetic of docs/scale.md.

One FLOP is one multiplication or one addition: a product of rows and queries of d dimensions is 2 d of them per pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROW_BYTES = 2  # float16 rows on disk
METADATA_BYTES = 145  # a row of metadata on disk (docs/scale.md: 60 GB for 413 M)
SCORE_BYTES = 45  # a pool row and test set, in the scores
PREDICTION_BYTES = 40  # a test image and model
NEIGHBOUR_BYTES = 12  # a row id and a similarity
UID_BYTES = 16
SPLIT_MEMORY = 80  # bytes of the driver per scored row: uid, row id, position, column, and the sort of the uids
TRAIN_MEMORY = 200  # per row used: uid, address, offset, caption
DEDUP_MEMORY = 250  # per row: order, hashes, edges
SAMPLE_BYTES = 1e9  # of rows that train an index
ADAM_COPIES = 3  # weights and two moments, float32, in a checkpoint
ADAM_TRAINING = 4  # weights, gradients and two moments, float32, of a worker that trains
FLOAT = 4
GAPS_NEIGHBOURS = 10
DEDUP_BLOCKS = 3 * 64e6  # two groups of rows, and one being read
SCORE_BLOCKS, GAPS_BLOCKS = 256e6, 128e6  # a group of rows
TRAINING_PASSES = 3  # a backward pass is two forward passes


@dataclass(frozen=True)
class Work:
    """What a step takes.

    Attributes:
        images: Images read and decoded.
        network_flops: FLOPs of image and text towers.
        product_flops: FLOPs of similarity products.
        read_bytes: Bytes read from storage.
        written_bytes: Bytes left on storage.
        driver_bytes: Memory of the driver that grows with the data; itself, it takes some 250 MB more.
        worker_bytes: Memory of one worker for weights, rows and queries; itself, it takes some 600 MB more on CPUs,
            and activations with the batch.
        on_gpu: Whether GPUs do the FLOPs where there are any.
    """

    images: float = 0.0
    network_flops: float = 0.0
    product_flops: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    driver_bytes: float = 0.0
    worker_bytes: float = 0.0
    on_gpu: bool = False


@dataclass(frozen=True)
class Machine:
    """What does the work, and how fast it is.

    Attributes:
        cores: CPU cores.
        gpus: GPUs.
        read_s: Seconds of a core to read and decode one image.
        core_network_flops: FLOP/s of a core in a network.
        core_product_flops: FLOP/s of a core in a product.
        gpu_flops: FLOP/s of a GPU in either.
        bytes_per_s: Bytes that storage gives per second, to all nodes together.
    """

    cores: float
    gpus: float
    read_s: float
    core_network_flops: float
    core_product_flops: float
    gpu_flops: float
    bytes_per_s: float

    def seconds(self, work: Work) -> float:
        """Return how long a step takes: its scarcest part, since reading, decoding and GPUs overlap.

        On CPUs decoding and computing share the cores, so they add up.
        """
        reading = work.read_bytes / self.bytes_per_s
        decoding = work.images * self.read_s / self.cores
        if work.on_gpu and self.gpus:
            return max(reading, decoding, (work.network_flops + work.product_flops) / (self.gpus * self.gpu_flops))
        computing = work.network_flops / self.core_network_flops + work.product_flops / self.core_product_flops
        return max(reading, decoding + computing / self.cores)


def embed(rows: float, dim: int, flops: float, image_bytes: float, parameters: float, text: bool = True) -> Work:
    """Return the work of embedding `rows` pairs.

    Args:
        rows: Pairs.
        dim: Dimension d.
        flops: Of one image and, with `text`, its caption.
        image_bytes: Of one image as it is stored.
        parameters: Of the encoder.
        text: Whether captions are embedded too.
    """
    written = rows * (ROW_BYTES * dim * (1 + text) + METADATA_BYTES)
    return Work(rows, rows * flops, 0.0, rows * image_bytes, written, 0.0, FLOAT * parameters, on_gpu=True)


def dedup(rows: float, dim: int, partitions: int, probes: int) -> Work:
    """Return the work of a deduplication; `partitions` = 0 compares all pairs (each once)."""
    pairs = rows * rows / 2 if not partitions else rows * partitions + probes * rows * rows / partitions
    passes = 2 if partitions else 1
    read = passes * rows * ROW_BYTES * dim
    return Work(0.0, 0.0, 2.0 * pairs * dim, read, rows / 8, DEDUP_MEMORY * rows, DEDUP_BLOCKS)


def score(rows: float, queries: float, sets: int, reference: float, dim: int, k: int) -> Work:
    """Return the work of the exact pass: pool and reference against all test images."""
    products = 2.0 * (rows + reference) * queries * dim
    written = rows * sets * SCORE_BYTES + queries * k * NEIGHBOUR_BYTES
    driver = rows / 8 + 2 * queries * k * NEIGHBOUR_BYTES
    worker = SCORE_BLOCKS + _of_queries(queries, dim, k)
    return Work(0.0, 0.0, products, (rows + reference) * ROW_BYTES * dim, written, driver, worker, on_gpu=True)


def _of_queries(queries: float, dim: int, k: int) -> float:
    """Bytes of test rows as they come and as float32, and of their lists."""
    return queries * (dim * (ROW_BYTES + FLOAT) + k * NEIGHBOUR_BYTES)


def gaps(rows: float, queries: float, reference: float, dim: int) -> Work:
    """Return the work of measuring the gap after all cuts, which is one pass."""
    products = 2.0 * (rows + reference) * queries * dim
    worker = GAPS_BLOCKS + _of_queries(queries, dim, GAPS_NEIGHBOURS)
    return Work(0.0, 0.0, products, (rows + reference) * ROW_BYTES * dim, worker_bytes=worker)


def split(rows: float) -> Work:
    """Return what one cut takes: the driver sorts the uids; at most all rows are kept."""
    return Work(written_bytes=rows * UID_BYTES, read_bytes=rows * (UID_BYTES + 8), driver_bytes=SPLIT_MEMORY * rows)


def index(rows: float, dim: int, cells: int, bytes_per_row: float, shards: int = 1) -> Work:
    """Return the work of an index in `shards` files of `cells` cells each (0: Flat)."""
    products = 2.0 * rows * cells * dim
    driver = min(SAMPLE_BYTES, rows * ROW_BYTES * dim)
    written = rows * bytes_per_row
    return Work(0.0, 0.0, products, rows * ROW_BYTES * dim, written, driver, written / shards)


def train(samples: float, used: float, flops: float, image_bytes: float, parameters: float, checkpoints: int) -> Work:
    """Return the work of one training.

    Args:
        samples: Samples seen.
        used: Different samples among them, at most.
        flops: Of one forward pass of an image and its caption.
        image_bytes: Of one image.
        parameters: Of the model.
        checkpoints: Kept.
    """
    state = FLOAT * ADAM_COPIES * parameters * checkpoints
    passes = TRAINING_PASSES * samples * flops
    worker = FLOAT * ADAM_TRAINING * parameters
    return Work(samples, passes, 0.0, samples * image_bytes, state, TRAIN_MEMORY * used, worker, on_gpu=True)


def evaluate(images: float, flops: float, image_bytes: float, parameters: float) -> Work:
    """Return the work of evaluating one model on all test images; its prompts are not counted."""
    written, worker = images * PREDICTION_BYTES, FLOAT * parameters
    return Work(images, images * flops, 0.0, images * image_bytes, written, worker_bytes=worker, on_gpu=True)


def default_partitions(rows: float, exact_rows: int, rows_per_partition: int) -> int:
    """Return how many partitions `dedup` takes by itself; 0 for all pairs."""
    return 0 if rows <= exact_rows else math.ceil(rows / rows_per_partition)
