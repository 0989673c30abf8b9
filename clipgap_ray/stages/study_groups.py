"""What a study asks of its grouped test set: backgrounds, photos cut apart, the join with similarity, groups found."""

from __future__ import annotations

from functools import partial

from clipgap_ray import testsets
from clipgap_ray.config.analyses import WORLD_MASKS
from clipgap_ray.config.cutout import CutoutSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.groups import AttributesSettings, DiscoverSettings
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.study import RunSection, StudyFile
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError
from clipgap_ray.stages import attributes, cutout, discover, embed, join, score
from clipgap_ray.stages.study_data import Data
from clipgap_ray.stages.study_step import Step


def label_steps(file: StudyFile, out: str, data: Data, weights: str, folder: str) -> list[Step]:
    """Backgrounds of the test set and of the pool, by the embeddings in a folder of the study."""
    test = file.analyses.test
    known = testsets.open_test_set(data.tests[test]).layout == "counteranimal"
    return [
        Step(
            f"label backgrounds of {name}",
            attributes.run,
            AttributesSettings(
                embeddings=f"{out}/{folder}/{name}",
                out=f"{out}/labels/{name}",
                prompts=file.analyses.backgrounds,
                pretrained=weights,
                given="folder" if known and name == test else "",
            ),
        )
        for name in (test, "pool")
    ]


def part_steps(file: StudyFile, out: str, data: Data, metric: tuple[str, str], device: str) -> list[Step]:
    """Cut the photos apart by their masks, and score animals and backgrounds as the whole photos were."""
    test, masks = file.analyses.test, file.analyses.masks
    source = data.tests[test]
    masks = f"{out}/world/masks/{test}" if masks == WORLD_MASKS else masks
    steps = [Step("cut photos apart", cutout.run, CutoutSettings(source=source, masks=masks, out=f"{out}/cut"))]
    for part in cutout.PARTS:
        rows = EmbedSettings(
            source=f"{out}/cut/{part}/{source.rstrip('/').rsplit('/', 1)[-1]}",
            out=f"{out}/cut-embed/{part}",
            model=metric[0],
            pretrained=metric[1],
            text=False,
            crop_border=data.crop.get(test, 0),
            device=device,  # type: ignore[arg-type]
            yes=True,  # whoever starts a whole study has agreed to its parts
        )
        scores = ScoreSettings(
            pool=f"{out}/embed/pool",
            keep=f"{out}/dedup",
            test=(f"{test}={rows.out}",),
            out=f"{out}/cut-scores/{part}",
            device=device,
        )
        steps += [Step(f"embed the {part}s", embed.run, rows), Step(f"score the {part}s", score.run, scores)]
    return steps


def join_steps(file: StudyFile, out: str, labelled: str) -> list[Step]:
    """Neighbours of CLIPs that saw the whole pool; and all models, each beside what it was trained on.

    A table of `gaps` names one neighbour only, and the scores name rows that a cut has removed: so neighbours are for
    the uncut pool. Its captions are read from the embeddings that were labelled: labels belong to those.
    """
    test = file.analyses.test
    labels = [f"{out}/labels/{name}" for name in (test, "pool")] if file.analyses.backgrounds else ["", ""]
    label_inputs = tuple(f"{folder}/manifest.json" for folder in labels if folder)
    parts = {part: f"{out}/cut-scores/{part}" for part in cutout.PARTS} if file.analyses.masks else {}
    steps = []
    whole = [file.first_seed(run) for run in file.whole_pool_runs()]
    if whole:
        predictions = {name: f"{out}/eval/{name}/{test}.parquet" for name in whole}
        pool = f"{out}/{labelled}/pool"
        settings = DropJoinSettings(
            predictions=tuple(f"{name}={path}" for name, path in predictions.items()),
            scores=(f"{out}/scores",),
            test=test,
            groups=file.pair(test),
            out=f"{out}/join/neighbours",
            pool=pool,
            attributes=labels[0],
            pool_attributes=labels[1],
            parts=tuple(f"{part}={folder}" for part, folder in parts.items()),
        )
        scored_by = [f"{folder}/manifest.json" for folder in (f"{out}/scores", *parts.values())]
        inputs = (*predictions.values(), *scored_by, f"{pool}/manifest.json", *label_inputs)
        scored = partial(_join, f"{out}/embed/pool")
        steps.append(Step("join with the photos' neighbours", scored, settings, inputs))
    supervised = tuple(file.first_seed(run) for run in file.runs if run.objective == "supervised")
    if len(supervised) > 1:
        beside = {file.first_seed(run): _own_data(run, out, test) for run in file.runs}
        predictions = {name: f"{out}/eval/{name}/{test}.parquet" for name in beside}
        settings = DropJoinSettings(
            predictions=tuple(f"{name}={path}" for name, path in predictions.items()),
            scores=tuple(f"{name}={table}" for name, (table, _) in beside.items()),
            column=tuple(f"{name}={column}" for name, (_, column) in beside.items()),
            test=test,
            groups=file.pair(test),
            out=f"{out}/join/equal-similarity",
            baseline=supervised,
        )
        inputs = (*predictions.values(), *dict.fromkeys(table for table, _ in beside.values()))
        steps.append(Step("join at equal similarity", join.run, settings, inputs))
    return steps


def _join(scored: str, settings: DropJoinSettings) -> None:
    """Join, once it is sure that the scores' row ids mean the same rows in the pool that was labelled.

    Raises:
        DataError: If they do not: shards were added to one of them before the other was there.
    """
    rows, labelled = (
        [(part.number, part.shard, part.num_rows) for part in EmbeddingSet.open(uri).parts]
        for uri in (scored, settings.pool)
    )
    if rows != labelled:
        raise DataError(
            f"{settings.pool} numbers {len(labelled)} shards otherwise than {scored}, {len(rows)}",
            hint=f"delete {settings.pool} and what was made from it, and run the study again",
        )
    join.run(settings)


def _own_data(run: RunSection, out: str, test: str) -> tuple[str, str]:
    """Query table and column of the similarity to what a run was trained on."""
    if run.train_on == "reference":
        return f"{out}/scores/queries/{test}.parquet", "tau"
    return f"{out}/gaps/{run.split}/{test}.parquet", "gap" if run.reference else "similarity"


def discover_step(file: StudyFile, out: str) -> Step:
    """Groups that the CLIPs would choose, and what choosing alone is worth."""
    test = file.analyses.test
    names = [file.first_seed(run) for run in file.runs if run.objective == "clip"]
    predictions = {name: f"{out}/eval/{name}/{test}.parquet" for name in names}
    settings = DiscoverSettings(
        predictions=tuple(f"{name}={path}" for name, path in predictions.items()),
        attributes=f"{out}/labels/{test}",
        out=f"{out}/discover",
        min_photos=file.analyses.min_photos,
    )
    return Step(
        "discover groups", discover.run, settings, (*predictions.values(), f"{out}/labels/{test}/manifest.json")
    )
