"""A deterministic world of image-text pairs whose structure is known, rendered without any download.

Studies of train-test similarity need a pool, a reference set and shifted test sets, and nobody knows the truth about
real ones: which pool images are copies, which show a test image, which background goes with which class. Here all of
it is planted and written down, so that every stage can be tested against facts instead of plausibility.

What a world is (`WorldSpec`, made by `preset("tiny")`, `preset("small")` or by hand):

* `pool/00000.tar` ..., as img2dataset writes them: photos, sketches and renditions of 24 classes with a long tail,
  under captions that name the class, do not, or lie; off-topic images; exact and near duplicates; leaked test images.
* `reference/train/0.tar` ... (photos only: the ImageNet-Train of this world) and `tests/<name>/test/0.tar` ..., both
  in CLIP_benchmark's layout. val is the reference's distribution, v2 another camera, sketch and r are other styles,
  a is hard, objectnet has things upside down and indoors.
* `counteranimal/<label> <name>/(common|counter)-<background>/*.jpg`: photos of 12 animals on their habitual and on
  their rarest background of the pool; `masks/counteranimal/.../*.jpg.png`: where the animal is in each of them.
* `kind="digits"` is the same world around scikit-learn's scanned digits: real scans, four styles, no backgrounds.

How truth is recorded: `render` returns a table of `TRUTH_SCHEMA` with one row per sample beside the files, never
inside them. Whoever renders all units concatenates the tables into `truth.parquet`. Rows that a fault makes
unreadable are in it, with row -1 and the fault's name.

How it works: a picture is a pure function of (spec, set, row) (`streams`), so a duplicate or a leak is a picture drawn
again. `plan` says who copies whom, `scenes` composes, `styles` paints, `captions` writes, `render` packs. The bytes
depend on the versions of numpy, Pillow and its libjpeg, and on nothing else.
"""

from clipgap_ray.world.render import Rendered, Unit, class_names, render, units
from clipgap_ray.world.spec import WorldSpec, evaluation_sets, preset
from clipgap_ray.world.truth import TRUTH_SCHEMA

__all__ = [
    "TRUTH_SCHEMA",
    "Rendered",
    "Unit",
    "WorldSpec",
    "class_names",
    "evaluation_sets",
    "preset",
    "render",
    "units",
]
