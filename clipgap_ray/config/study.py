"""Settings of `run` (a whole study from one YAML file), `demo` and `status`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
import tyro

from clipgap_ray import schema, world
from clipgap_ray.config import split as split_config
from clipgap_ray.config.analyses import WORLD_MASKS, AnalysesSection
from clipgap_ray.config.base import Operational, Settings, Storage, StorageSettings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError

KINDS: dict[str, type[split_config.SplitSettings]] = {
    "gap-match": split_config.GapMatch,
    "near": split_config.Near,
    "far": split_config.Far,
    "core": split_config.Core,
    "random": split_config.Random,
    "threshold": split_config.Threshold,
    "score": split_config.Score,
    "density-match": split_config.DensityMatch,
    "equalise": split_config.Equalise,
    "full": split_config.Full,
}


class WorldSection(Settings):
    """A world to render; leave it out when `data` names real data."""

    kind: Literal["miniature", "digits"] = "miniature"
    """Which world."""
    preset: Literal["tiny", "small"] = "small"
    """Its size."""
    rows: pydantic.PositiveInt | None = None
    """Pool rows, instead of the preset's."""
    seed: int = 0
    """Same seed, same bytes."""
    correlation: float | None = None
    """Class-background correlation of the pool."""
    tests: tuple[str, ...] = ()
    """Which of its test sets the study uses; none named: all of them."""

    def test_names(self) -> tuple[str, ...]:
        """Return the test sets that the study uses, in the world's order.

        Raises:
            ConfigError: If the world has no test set of a name.
        """
        spec = world.preset(self.preset, kind=self.kind)
        there = (*world.evaluation_sets(spec), *(["counteranimal"] if spec.counter_rows else []))
        unknown = sorted(set(self.tests) - set(there))
        if unknown:
            raise ConfigError(f"world.tests names {unknown}; a {self.kind} world has {list(there)}")
        return tuple(name for name in there if not self.tests or name in self.tests)


class DataSection(Settings):
    """Where real data lies, instead of a world."""

    pool: str
    """Tars of image-text pairs."""
    reference: str
    """Labelled set whose gap is matched."""
    tests: dict[str, str]
    """Test sets by name."""
    crop: dict[str, int] = pydantic.Field(default_factory=dict)
    """Pixels to cut from every side of a test set's images (objectnet: 2), for similarity and accuracy alike."""


class TrainSection(Settings):
    """Training settings that all runs share; the names are those of `clipgap train`."""

    model: str = "conv-64"
    """open_clip model to train."""
    num_samples: pydantic.PositiveInt = 60_000
    """Samples seen by every run: the same for all splits."""
    batch_size: pydantic.PositiveInt = 32
    """Samples per worker and step."""
    workers: pydantic.NonNegativeInt = 2
    """DDP workers."""
    lr: pydantic.PositiveFloat = 1.5e-3
    """Peak learning rate."""
    warmup: pydantic.NonNegativeInt = 50
    """Steps of warm-up."""
    wd: pydantic.NonNegativeFloat = 0.05
    """Weight decay."""
    beta2: float | None = None
    """AdamW; this and what follows: as `clipgap train` has it, unless given."""
    eps: float | None = None
    """AdamW."""
    precision: Literal["fp32", "amp_bf16"] | None = None
    """amp_bf16: bfloat16 autocast."""
    accum_freq: pydantic.PositiveInt | None = None
    """Forward passes per step."""
    grad_checkpointing: bool | None = None
    """Compute activations again in the backward pass."""
    decoders: pydantic.NonNegativeInt | None = None
    """Ray actors per worker that decode."""
    checkpoint_every: pydantic.PositiveInt | None = None
    """Steps between checkpoints."""


class RunSection(Settings):
    """One model to train, for every seed of the study."""

    split: str
    """Name of a split below `splits`, or `full` (the whole pool), or `none` (the reference alone)."""
    reference: bool = False
    """Mix the reference in."""
    objective: Literal["clip", "supervised"] = "clip"
    """supervised: a classifier trained on the reference (with `split: none`)."""
    num_samples: pydantic.PositiveInt | None = None
    """Other than the shared number; for baselines of several lengths."""

    @property
    def name(self) -> str:
        """Name of the run without its seed."""
        base = self.split if self.split != "none" else "reference"
        words = [base if self.objective == "clip" else f"supervised-{base}"]
        if self.reference and self.split != "none":
            words.append("with-reference")
        if self.num_samples is not None:
            words.append(str(self.num_samples))
        return "-".join(words)

    @property
    def train_on(self) -> str:
        """What it sees, in the words of study.json."""
        if self.split == "none":
            return "reference"
        return "pool+reference" if self.reference else "pool"


class StudyFile(Settings):
    """A whole study: world or data, metric encoder, splits, trainings, evaluation, report, index."""

    name: str
    """Name of the study."""
    world: WorldSection | None = None
    """A world to render."""
    data: DataSection | None = None
    """Or real data."""
    main_test: str = "val"
    """Test set of the same distribution as the reference."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial weights and sample order; every run is trained once per seed."""
    metric_model: str = ""
    """open_clip model of the similarity; empty: the first run of the study (the CLIP trained on the full pool)."""
    metric_pretrained: str = ""
    """Its weights."""
    min_similarity: float = 0.98
    """Duplicates are rows at least this alike; what a value looks like depends on the metric encoder."""
    train: TrainSection = TrainSection()
    """Shared training settings."""
    splits: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    """Splits by name; `kind` and the settings of `clipgap split <kind>`."""
    runs: tuple[RunSection, ...]
    """Models to train."""
    probe_shots: tuple[pydantic.PositiveInt, ...] = ()
    """Images per class of the reference for few-shot probes of every CLIP (1 2 4 8 16); none: no probes."""
    groups: dict[str, tuple[str, ...]] = pydantic.Field(default_factory=dict)
    """Groups of a test set in their order, the base first: the report compares all with it, `analyses.join` the first
    two. Default: common, then counter; in the report else by number of photos."""
    analyses: AnalysesSection = AnalysesSection()
    """Further analyses for the report."""
    index_shards: pydantic.PositiveInt = 2
    """FAISS index shards to build over the pool for `clipgap serve`."""
    assert_effects: bool = False
    """Fail unless the paper's effects show: near < random < far, gap-matched test sets drop, the main one does not."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> StudyFile:
        if (self.world is None) == (self.data is None):
            raise ConfigError("a study needs one of `world` and `data`")
        if self.main_test not in self.test_names():
            raise ConfigError(f"main_test is {self.main_test!r}, the study's test sets are {list(self.test_names())}")
        for name, values in self.splits.items():
            schema.check_name(name, "split")
            self.split_settings(name, values, "scores", f"{name}.npy")
        if self.data is not None and set(self.data.crop) - set(self.data.tests):
            raise ConfigError(f"data.crop names no test set: {sorted(set(self.data.crop) - set(self.data.tests))}")
        unknown = {run.split for run in self.runs} - set(self.splits) - {"full", "none"}
        if unknown:
            raise ConfigError(f"runs name splits that are not defined: {sorted(unknown)}")
        if not self.metric_model and (self.runs[0].split, self.runs[0].objective) != ("full", "clip"):
            raise ConfigError("without metric_model the first run must be the full pool's CLIP: it is the metric")
        unknown = set(self.groups) - set(self.test_names())
        if unknown:
            raise ConfigError(f"groups names no test set: {sorted(unknown)}; there are {list(self.test_names())}")
        short = [test for test, names in self.groups.items() if len(set(names)) < max(2, len(names))]
        if short:
            raise ConfigError(
                f"groups.{short[0]} is {list(self.groups[short[0]])}: expected two different groups or more"
            )
        self._check_analyses()
        return self

    def _check_analyses(self) -> None:
        """What the analyses name is in this study."""
        asked = self.analyses
        tests = self.test_names()
        if asked.about_groups and asked.test not in tests:
            raise ConfigError(
                f"analyses.test is {asked.test!r}, the study's test sets are {list(tests)}",
                hint="name one whose images are in two groups, as common and counter; digits worlds have none",
            )
        clip = [run.name for run in self.runs if run.objective == "clip"]
        second = asked.second_encoder
        if second is not None and second.run and second.run not in clip:
            raise ConfigError(f"analyses.second_encoder.run is {second.run!r}, the study's CLIPs are {clip}")
        if asked.discover and not clip:
            raise ConfigError("analyses.discover compares CLIPs, but all runs are supervised", hint="add a run")
        if asked.masks and not self.whole_pool_runs():
            raise ConfigError("analyses.masks needs a CLIP trained on the full pool", hint="add {split: full} to runs")
        if asked.masks == WORLD_MASKS and self.world is None:
            raise ConfigError(
                f"analyses.masks is {WORLD_MASKS!r}, but the study renders none", hint="name their folder"
            )
        supervised = sum(run.objective == "supervised" for run in self.runs)
        if asked.join and not self.whole_pool_runs() and supervised < 2:
            raise ConfigError(
                f"analyses.join needs a CLIP trained on the full pool, or two supervised runs; runs are "
                f"{[run.name for run in self.runs]}",
                hint="add {split: full} to runs",
            )

    def test_names(self) -> tuple[str, ...]:
        """Return the names of the test sets: those of `data`, or those that the world will have."""
        if self.data is not None:
            return tuple(self.data.tests)
        assert self.world is not None  # one of the two is there
        return self.world.test_names()

    def pair(self, test: str) -> tuple[str, str]:
        """Return the two groups of a test set that a join compares."""
        names = self.groups.get(test, ("common", "counter"))
        return names[0], names[1]

    def first_seed(self, run: RunSection) -> str:
        """Return the name of a run's model of the first seed."""
        return f"{run.name}-s{self.seeds[0]}"

    def whole_pool_runs(self) -> list[RunSection]:
        """Return the CLIPs that were trained on the uncut pool."""
        return [run for run in self.runs if run.objective == "clip" and run.split == "full"]

    @staticmethod
    def split_settings(name: str, values: dict[str, Any], scores: str, out: str) -> split_config.SplitSettings:
        """Build the settings of a split from its section."""
        kind = values.get("kind")
        if kind not in KINDS:
            raise ConfigError(f"split {name}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        return KINDS[kind].load({**values, "scores": scores, "out": out}, f"split {name}")


class RunSettings(Settings):
    """Run a whole study from a YAML file: world, embeddings, scores, splits, trainings, evaluation, report, index."""

    study: tyro.conf.Positional[str]
    """YAML file, for example studies/miniature.yaml."""
    out: str = ""
    """Directory of the study; empty: out/<name of the study>."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""
    trainings: Annotated[pydantic.NonNegativeInt, Operational()] = 0
    """Trainings at the same time; 0: as many as the cluster's CPUs and GPUs take."""
    limits: Limits = LimitsSettings()
    """When to stop."""


class StatusSettings(Settings):
    """What is done and what is left in the directory of a stage or a study, also while it runs elsewhere."""

    directory: tyro.conf.Positional[str]
    """Directory of a stage or a study."""


class DoctorSettings(Settings):
    """Check this environment (versions, the one FAISS, torch beside torchvision, CPUs, GPUs, memory), or look into a
    source before hours are spent on it: suffixes, captions, fields, uids, broken images, estimated rows."""

    source: tyro.conf.Positional[str] = ""
    """A source as `clipgap embed` takes it; left out: check the environment. With --cluster: compare its region."""
    first: pydantic.PositiveInt = 2
    """Shards to look into."""
    samples: pydantic.PositiveInt = 1000
    """Samples to look at in each of them."""
    storage: Storage = StorageSettings()
    """How S3 stores are reached."""
    cluster: bool = False
    """Compare Python, Ray, torch, FAISS and CUDA on every node of the cluster at RAY_ADDRESS with this driver's, and
    the nodes' AWS region with that of the source's bucket."""


class DemoSettings(Settings):
    """Run the miniature study (about a quarter of an hour on two cores) and say where its report is."""

    out: str = "demo"
    """Directory of the study."""
    fast: bool = False
    """The tiny world: a report in three minutes that shows the machinery, not the effect."""
