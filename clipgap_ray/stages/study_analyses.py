"""What a study runs after its evaluations because its file asks for it: every item is a command with settings.

    STUDY/probes/RUN, linear/RUN     few-shot and linear probes         STUDY/labels/pool, labels/TEST  backgrounds
    STUDY/asked/RUN                  other prompts, candidate labels    STUDY/join/neighbours, join/equal-similarity
    STUDY/cut, cut-embed, cut-scores photos by masks                    STUDY/discover
    STUDY/second-embed, second-scores, agreement   another encoder

Stages with a commit log skip what they have committed. `join`, `discover` and `agreement` have none: the step writes
OUT/made_from.json after them and skips them while settings, inputs and version are those. Models are compared by their
first seed: a seed more is a model more in a regression per draw. An analysis that refuses its input (groups that do not
overlap, too few photos) does not take the report with it: it is said at the end, as an error.
"""

from __future__ import annotations

from clipgap_ray import encoder, store, testsets
from clipgap_ray.config.analyses import WORLD_MASKS
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.study import RunSection, StudyFile
from clipgap_ray.config.train import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import agreement, attributes, embed, evaluate, evaluate_sets, score, study_groups
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.study_data import Data
from clipgap_ray.stages.study_step import Step


def run(steps: list[Step]) -> dict[str, str]:
    """Run steps in their order.

    Returns:
        By title, why a step refused its input; steps after it run all the same, and stumble over what it lacks.
    """
    refused = {}
    for step in steps:
        try:
            step()
        except (ConfigError, DataError) as error:
            logger.warning("%s: %s", step.title, error)
            refused[step.title] = str(error)
    return refused


def raise_refused(study: str, refused: dict[str, str]) -> None:
    """Fail on analyses that could not be made; a study does so after its report is written.

    Raises:
        DataError: With the first of them and its reason.
    """
    if refused:
        title, reason = next(iter(refused.items()))
        raise DataError(
            f"{study}: {len(refused)} analyses could not be made, first: {title}: {reason}",
            hint="the report is there without them; correct `analyses` in the study's file and run it again",
        )


def check(file: StudyFile, out: str, data: Data) -> None:
    """Refuse what later steps would refuse after hours: prompts, lists of candidates, models.

    Raises:
        ConfigError: A file of prompts that is not there, more candidates than classes, an unknown model.
    """
    asked = file.analyses
    if asked.prompts or asked.candidates_k:
        evaluate_sets.questions(_asking(file, out, data, file.runs[0].name, "auto", clip=True))
    if asked.backgrounds:
        attributes.read_prompts(asked.backgrounds)
    if asked.masks and asked.masks != WORLD_MASKS and not store.list_names(asked.masks):
        raise ConfigError(
            f"analyses.masks {asked.masks} has no masks", hint="a folder as `clipgap cutout --masks` takes"
        )
    if asked.second_encoder is not None and asked.second_encoder.model:
        encoder.check(EncoderSettings(asked.second_encoder.model, asked.second_encoder.pretrained))


def steps(file: StudyFile, out: str, data: Data, metric: tuple[str, str], device: str) -> list[Step]:
    """Return what a study asks for, in the order in which it must run.

    Args:
        file: The study.
        out: Its directory.
        data: Its data, which must be there.
        metric: Model and weights of the similarity.
        device: auto, cpu or cuda.
    """
    found = [*_probes(file, out, data, device), *_ways(file, out, data, device)]
    second = _second(file, out)
    if second is not None:
        found += _second_steps(out, data, second, device)
    asked, labelled = file.analyses, "embed"
    if asked.backgrounds:
        labeller = metric
        if second is not None and EncoderSettings(*second).has_text:
            labeller, labelled = second, "second-embed"
        found += study_groups.label_steps(file, out, data, labeller[1], labelled)
    if asked.masks:
        found += study_groups.part_steps(file, out, data, metric, device)
    if asked.join:
        found += study_groups.join_steps(file, out, labelled)
    if asked.discover:
        found.append(study_groups.discover_step(file, out))
    return found


# --- probes and ways of asking -----------------------------------------------------------------------------


def _models(file: StudyFile, *, clip: bool = False) -> list[tuple[RunSection, int]]:
    return [(run, seed) for seed in file.seeds for run in file.runs if not clip or run.objective == "clip"]


def _crop(data: Data, tests: dict[str, str], of: str = "") -> tuple[str, ...]:
    """The border of every test set; `of`: these are names of ways of asking about that one."""
    return tuple(f"{name}={data.crop[of or name]}" for name in tests if (of or name) in data.crop)


def _probes(file: StudyFile, out: str, data: Data, device: str) -> list[Step]:
    """Probes on frozen features of the reference, the shots drawn by the run's seed."""
    kinds = [("few-shot probe", "probes", file.probe_shots)] if file.probe_shots else []
    kinds += [("linear probe", "linear", ())] if file.analyses.linear_probe else []
    if not kinds:
        return []
    classes = testsets.open_test_set(data.reference).class_names
    tests = {name: uri for name, uri in data.tests.items() if testsets.open_test_set(uri).class_names == classes}
    return [
        Step(
            f"{title} {run.name}-s{seed}",
            evaluate.run,
            EvaluateSettings(
                model=file.train.model,
                pretrained=f"{out}/runs/{run.name}-s{seed}",
                task="linear-probe",
                shots=shots,
                seed=seed,
                test=tuple(f"{test}={uri}" for test, uri in tests.items()),
                train=tuple(f"{test}={data.reference}" for test in tests),
                out=f"{out}/{folder}/{run.name}-s{seed}",
                crop=_crop(data, tests),
                device=device,  # type: ignore[arg-type]
            ),
        )
        for title, folder, shots in kinds
        for run, seed in _models(file, clip=True)
    ]


def _ways(file: StudyFile, out: str, data: Data, device: str) -> list[Step]:
    """Every model asked again about the grouped test set; a classifier knows no prompts."""
    asked = file.analyses
    return [
        Step(
            f"ask {run.name}-s{seed} otherwise",
            evaluate.run,
            _asking(file, out, data, f"{run.name}-s{seed}", device, clip=run.objective == "clip"),
        )
        for run, seed in _models(file, clip=not asked.candidates_k)
        if asked.prompts or asked.candidates_k
    ]


def _asking(file: StudyFile, out: str, data: Data, name: str, device: str, *, clip: bool) -> EvaluateSettings:
    asked = file.analyses
    prompts = {f"{asked.test}-{way}": word for way, word in asked.ways().items()} if clip else {}
    names = [*([asked.test] if asked.candidates_k else []), *prompts]
    tests = dict.fromkeys(names, data.tests[asked.test])
    return EvaluateSettings(
        model=file.train.model,
        pretrained=f"{out}/runs/{name}",
        test=tuple(f"{test}={uri}" for test, uri in tests.items()),
        templates=tuple(f"{test}={word}" for test, word in prompts.items()),
        candidates_k=asked.candidates_k,
        out=f"{out}/asked/{name}",
        crop=_crop(data, tests, asked.test),
        device=device,  # type: ignore[arg-type]
    )


# --- another encoder -----------------------------------------------------------------------------------------


def _second(file: StudyFile, out: str) -> tuple[str, str] | None:
    """Model and weights of the second encoder."""
    second = file.analyses.second_encoder
    if second is None or second.model:
        return None if second is None else (second.model, second.pretrained)
    run = next(run for run in file.runs if run.name == second.run)  # StudyFile knows that it is there
    return file.train.model, f"{out}/runs/{file.first_seed(run)}"


def _second_steps(out: str, data: Data, second: tuple[str, str], device: str) -> list[Step]:
    """Embed and score by the second encoder; a deduplication is of one encoder, so every row is scored."""
    steps = [
        Step(
            f"embed {name} by the second encoder",
            embed.run,
            EmbedSettings(
                source=source,
                out=f"{out}/second-embed/{name}",
                model=second[0],
                pretrained=second[1],
                text=False,
                crop_border=data.crop.get(name, 0),
                device=device,  # type: ignore[arg-type]
                yes=True,  # whoever starts a whole study has agreed to its parts
            ),
        )
        for name, source in data.sources().items()
    ]
    scores = ScoreSettings(
        pool=f"{out}/second-embed/pool",
        test=tuple(f"{name}={out}/second-embed/{name}" for name in data.tests),
        reference=(f"{out}/second-embed/reference",),
        out=f"{out}/second-scores",
        device=device,
    )
    both = (f"{out}/scores", f"{out}/second-scores")
    compare = Step(
        "agreement of both encoders",
        agreement.run,
        AgreementSettings(scores=both, out=f"{out}/agreement"),
        tuple(f"{scores}/manifest.json" for scores in both),
    )
    return [*steps, Step("score by the second encoder", score.run, scores), compare]
