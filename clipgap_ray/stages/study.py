"""A whole study: every stage in order, each resumable, then findings, report and index.

    STUDY/world      or the data it names          STUDY/splits   NAME.npy, recipes
    STUDY/runs       one directory per model       STUDY/gaps     gap after every cut
    STUDY/embed      pool, reference, test sets    STUDY/eval     one directory per model
    STUDY/dedup      keep table                    STUDY/index    sharded FAISS index of the pool
    STUDY/scores     score tables                  STUDY/report   index.html

What the file asks for under `analyses` (and few-shot probes) comes after the evaluations: `study_analyses`.

Running again skips what is done. The metric encoder is the first run's model (in the paper, too, the similarity
model was trained on the pool), unless the study names another.
"""

from __future__ import annotations

import time
from typing import Any

from clipgap_ray import __version__, rundir, store
from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import Full, GapsSettings
from clipgap_ray.config.study import DemoSettings, RunSection, RunSettings, StudyFile
from clipgap_ray.config.train import EvaluateSettings, TrainSettings
from clipgap_ray.stages import (
    dedup,
    embed,
    evaluate,
    findings,
    gaps,
    index,
    report,
    score,
    split,
    study_analyses,
    sweep,
    train,
)
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.study_data import Data, prepare
from clipgap_ray.stages.study_step import MADE_FROM, Step


def run(settings: RunSettings) -> rundir.Summary:
    """Run a study file.

    Raises:
        ConfigError: On any impossible setting of any stage, before the first one starts.
        DataError: If a finding that the study asserts does not hold, or an analysis could not be made.
    """
    file = StudyFile.load(read_yaml(settings.study), settings.study)
    out = settings.out or f"out/{file.name}"
    started = time.monotonic()
    data = prepare(file, out)
    study_analyses.check(file, out, data)
    metric = _metric(file, out, data, settings.device)
    _embed_all(out, data, metric, settings.device)
    splits = _score_and_split(file, out, data)
    sweep.run(_trainings(file, out, data, settings.device), settings.trainings)
    _evaluate_all(file, out, data, settings.device)
    refused = study_analyses.run(study_analyses.steps(file, out, data, metric, settings.device))
    store.write_json(f"{out}/study.json", _description(file, data, metric))
    found = findings.run(out, file.assert_effects)
    page = _report(out)
    _step("index")
    index.run(IndexSettings(embeddings=f"{out}/embed/pool", out=f"{out}/index", shards=file.index_shards))
    findings.check(out, found)
    study_analyses.raise_refused(out, refused)
    summary = rundir.Summary("run", seconds=time.monotonic() - started)
    summary.extra = {"report": page, "splits": splits, "findings": found}
    logger.info("study %s is complete: open %s", file.name, summary.extra["report"])
    return summary


def demo(settings: DemoSettings) -> rundir.Summary:
    """Run the study of the demo, from the YAML that ships with the repository."""
    name = "tiny" if settings.fast else "miniature"
    return run(RunSettings(study=f"studies/{name}.yaml", out=settings.out))


def _step(name: str) -> None:
    logger.info("-- %s", name)


def _report(out: str) -> str:
    """Write the page, unless all that it is made of is as it was when the page was written; returns where it is."""
    folder = f"{out}/report"
    if not store.exists(f"{folder}/index.html"):
        store.remove(f"{folder}/{MADE_FROM}")
    Step("report", report.run, ReportSettings(study=out, out=folder), tuple(_manifests(out)))()
    return f"{folder}/index.html"


def _manifests(out: str) -> list[str]:
    """The files of a study that hold the digests of all others."""
    found = [f"{out}/study.json", f"{out}/report/findings.json"]
    for folder in store.list_names(out):
        if folder in ("report", "world", "index"):
            continue
        for name in store.list_names(f"{out}/{folder}"):
            if name.endswith(("manifest.json", "recipe.json", MADE_FROM)):
                found.append(f"{out}/{folder}/{name}")
            elif "." not in name:
                nested = (f"{out}/{folder}/{name}/{file}" for file in ("manifest.json", MADE_FROM))
                found += [uri for uri in nested if store.exists(uri)]
    return found


def _train_settings(file: StudyFile, run: RunSection, seed: int, out: str, data: Data, device: str) -> TrainSettings:
    values: dict[str, Any] = file.train.model_dump(exclude_none=True)
    if run.num_samples is not None:
        values["num_samples"] = run.num_samples
    alone = run.split == "none"
    # The full pool is trained on before splits exist (its model is the metric), so it is the pool as it is.
    uncut = run.split in ("full", "none")
    return TrainSettings(
        source=data.reference if alone else data.pool,
        reference=data.reference if run.reference and not alone else "",
        split="" if uncut else f"{out}/splits/{run.split}.npy",
        samples=f"{out}/runs/samples-{'reference' if alone else 'pool'}",
        out=f"{out}/runs/{run.name}-s{seed}",
        objective=run.objective,
        seed=seed,
        device=device,  # type: ignore[arg-type]
        **values,
    )


def _metric(file: StudyFile, out: str, data: Data, device: str) -> tuple[str, str]:
    """Return (model, weights) of the similarity, training the first run if the study names none."""
    if file.metric_model:
        return file.metric_model, file.metric_pretrained
    _step("train the metric encoder on the full pool")
    settings = _train_settings(file, file.runs[0], file.seeds[0], out, data, device)
    train.run(settings)
    return settings.model, settings.out


def _embed_all(out: str, data: Data, metric: tuple[str, str], device: str) -> None:
    for name, source in data.sources().items():
        _step(f"embed {name}")
        embed.run(
            EmbedSettings(
                source=source,
                out=f"{out}/embed/{name}",
                model=metric[0],
                pretrained=metric[1],
                crop_border=data.crop.get(name, 0),
                device=device,  # type: ignore[arg-type]
                yes=True,  # whoever starts a whole study has agreed to its parts
            )
        )


def _score_and_split(file: StudyFile, out: str, data: Data) -> list[str]:
    """Deduplicate, score, cut every split, and measure the gap after each cut."""
    pool = f"{out}/embed/pool"
    _step("dedup")
    dedup.run(DedupSettings(pool=pool, out=f"{out}/dedup", min_similarity=file.min_similarity))
    _step("score")
    tests = tuple(f"{name}={out}/embed/{name}" for name in data.tests)
    score.run(
        ScoreSettings(
            pool=pool, keep=f"{out}/dedup", test=tests, reference=(f"{out}/embed/reference",), out=f"{out}/scores"
        )
    )
    _step("split")
    paths = [f"{out}/splits/full.npy"]
    recipe = split.run(Full(scores=f"{out}/scores", out=paths[0]))
    for name, values in file.splits.items():
        paths.append(f"{out}/splits/{name}.npy")
        values = {**values, "match": f"{out}/splits/{values['match']}.npy"} if values.get("match") else values
        recipe = split.run(StudyFile.split_settings(name, values, f"{out}/scores", paths[-1]))  # type: ignore[arg-type]
        logger.info("%s keeps %s, re-scored %d", name, recipe["counts"], recipe["rescored"])
    gaps.run(GapsSettings(pool=pool, scores=f"{out}/scores", split=tuple(paths), out=f"{out}/gaps"))
    return ["full", *file.splits]


def _trainings(file: StudyFile, out: str, data: Data, device: str) -> list[TrainSettings]:
    return [_train_settings(file, run, seed, out, data, device) for seed in file.seeds for run in file.runs]


def _evaluate_all(file: StudyFile, out: str, data: Data, device: str) -> None:
    tests = tuple(f"{name}={uri}" for name, uri in data.tests.items())
    for seed in file.seeds:
        for run in file.runs:
            name = f"{run.name}-s{seed}"
            _step(f"evaluate {name}")
            evaluate.run(
                EvaluateSettings(
                    model=file.train.model,
                    pretrained=f"{out}/runs/{name}",
                    test=tests,
                    out=f"{out}/eval/{name}",
                    crop=tuple(f"{test}={pixels}" for test, pixels in data.crop.items()),
                    device=device,  # type: ignore[arg-type]
                )
            )


def _description(file: StudyFile, data: Data, metric: tuple[str, str]) -> dict[str, Any]:
    """study.json: what report, status and serve read."""
    return {
        "name": file.name,
        "version": __version__,
        "seeds": list(file.seeds),
        "settings": file.model_dump(mode="json"),
        "metric": {"model": metric[0], "pretrained": metric[1]},
        "tests": list(data.tests),
        "reference": "reference",
        "main_test": file.main_test,
        "groups": {test: list(names) for test, names in file.groups.items()},
        "base_split": "full",
        "data": {"pool": data.pool, "reference": data.reference, "tests": data.tests},
        "runs": [
            {
                "name": f"{run.name}-s{seed}",
                "split": "full" if run.split == "none" else run.split,
                "objective": run.objective,
                "train_on": run.train_on,
                "seed": seed,
                "num_samples_seen": run.num_samples or file.train.num_samples,
                "model": file.train.model,
            }
            for seed in file.seeds
            for run in file.runs
        ],
        "splits": ["full", *file.splits],
    }
