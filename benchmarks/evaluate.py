"""Zero-shot evaluation against the encoder alone: the same images, model and process, in alternating rounds.

The encoder's rate is that of `encode_images` on pixels that are decoded already; evaluation reads the tars, decodes in
threads, encodes, and scores. Prints the medians and their ratio.

    python benchmarks/evaluate.py [--model ViT-B-32] [--images 512] [--size 256] [--decoders 2] [--rounds 5]
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.shards import write_tar
from clipgap_ray.stages import evaluate_models
from clipgap_ray.stages.evaluate_io import decoded
from clipgap_ray.stages.evaluate_sets import questions


def write_set(folder: Path, images: int, size: int) -> None:
    """Write a test set of smooth JPEGs (noise would not compress like photographs)."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(images):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        samples.append((f"{number:06d}", {"jpg": buffer.getvalue(), "cls": str(number % 10).encode()}))
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "0.tar").write_bytes(write_tar(samples))
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(f"thing {i}" for i in range(10)))


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder, "set"), options.images, options.size)
        words = {"model": options.model, "pretrained": "random", "test": (f"set={folder}/set",), "out": folder}
        question = questions(EvaluateSettings(**words))["set"]
        settings = EncoderSettings(options.model, "random", batch_size=options.batch_size)
        encoder, score = settings.build(), evaluate_models.logits_of(settings, question)
        plain = [
            pixels
            for _, pixels in decoded(question.test_set, encoder.preprocess, options.batch_size, options.decoders, {})
        ]
        rates: dict[str, list[float]] = {"encoder alone": [], "evaluation": []}
        for turn in range(options.rounds + 1):  # the first one warms up
            for name in rates:
                started = time.perf_counter()
                if name == "encoder alone":
                    for pixels in plain:
                        encoder.encode_images(pixels)
                else:
                    source = decoded(question.test_set, encoder.preprocess, options.batch_size, options.decoders, {})
                    for _, pixels in source:
                        score(pixels)
                if turn:
                    rates[name].append(options.images / (time.perf_counter() - started))
    bare = statistics.median(rates["encoder alone"])
    print(f"{options.model}, {options.images} JPEGs of {options.size} px, {options.rounds} rounds")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:14} {median:8.1f} images/s  {median / bare:5.3f} x  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
