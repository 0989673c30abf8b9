"""`clipgap <verb>`: the same settings as the YAML files and the jobs, built with tyro from the settings classes.

Results go to stdout as JSON, everything else to stderr. Exit codes: 0 complete, 1 error, 3 complete but more was
skipped than allowed, 4 an audit's `--fail-on` rule held, 5 stopped by `--max-hours` or `--max-cost`, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import select
import sys
from dataclasses import dataclass
from typing import Any

import pydantic

from clipgap_ray import __version__
from clipgap_ray.errors import ClipgapError, ConfigError, StoppedError

EXIT_ERROR, EXIT_SKIPPED, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 3, 5, 130


@dataclass(frozen=True)
class Verb:
    """A command: the settings class that reads its flags and the function that runs it, imported when needed."""

    settings: str
    runner: str
    line: str


VERBS = {
    "demo": Verb("study:DemoSettings", "stages.study:demo", "run the miniature study and show its report"),
    "world": Verb("world:WorldSettings", "stages.world:run", "render a miniature world with known truth"),
    "import": Verb("embed:ImportSettings", "stages.imports:run", "bring ready embeddings into the layout"),
    "embed": Verb("embed:EmbedSettings", "stages.embed:run", "embed images and captions, one part per shard"),
    "plan": Verb("embed:PlanSettings", "stages.plan:run", "rows, disk, memory and time of an embed job, from a probe"),
    "plan-study": Verb("plan:StudyPlanSettings", "stages.plan_study:run", "time, cost, disk and memory of a study"),
    "dedup": Verb("dedup:DedupSettings", "stages.dedup:run", "find duplicates and decide which rows stay"),
    "score": Verb("score:ScoreSettings", "stages.score:run", "one exact pass: pool rows against all test sets"),
    "index": Verb("index:IndexSettings", "stages.index:run", "build a sharded FAISS index"),
    "gaps": Verb("split:GapsSettings", "stages.gaps:run", "measure the similarity gap after every cut"),
    "export": Verb("export:ExportSettings", "stages.export:run", "copy a split into new shards, bytes unchanged"),
    "train": Verb("train:TrainSettings", "stages.train:run", "train CLIP (or a classifier) on a virtual split"),
    "evaluate": Verb("train:EvaluateSettings", "stages.evaluate:run", "zero-shot accuracy, every prediction kept"),
    "report": Verb("report:ReportSettings", "stages.report:run", "turn a study into one page"),
    "audit": Verb("audit:AuditSettings", "stages.audit:run", "is this test set in that pool? no training"),
    "shift": Verb("shift:ShiftSettings", "stages.shift:run", "drop between groups of a test set, with intervals"),
    "attributes": Verb("groups:AttributesSettings", "stages.attributes:run", "label backgrounds by zero-shot"),
    "discover": Verb("groups:DiscoverSettings", "stages.discover:run", "groups by accuracy, without selection's gain"),
    "join": Verb("join:DropJoinSettings", "stages.join:run", "how much of a drop is distance from the training pool"),
    "cutout": Verb("cutout:CutoutSettings", "stages.cutout:run", "photos by masks: the animal alone, and without it"),
    "agreement": Verb("join:AgreementSettings", "stages.agreement:run", "do two encoders prune the same rows?"),
    "robustness": Verb("robustness:RobustnessSettings", "stages.robustness:run", "effective robustness of models"),
    "run": Verb("study:RunSettings", "stages.study:run", "run a whole study from a YAML file"),
    "serve": Verb("serve:ServeSettings", "serving.start:run", "search and zero-shot over HTTP"),
    "query": Verb("ask:QuerySettings", "client.commands:query", "ask a running service: nearest rows of a query"),
    "swap": Verb("ask:SwapCommand", "client.commands:swap", "put another version of an index into a running service"),
    "status": Verb("study:StatusSettings", "status:run", "what is done and what is left in a directory"),
    "doctor": Verb("study:DoctorSettings", "doctor:run", "check this environment, or look into a source"),
}
SPLITS = {
    "gap-match": Verb("split:GapMatch", "stages.split:run", "remove rows closer to a test set than the reference is"),
    "near": Verb("split:Near", "stages.split:run", "near-pruning: keep the LEAST similar rows"),
    "far": Verb("split:Far", "stages.split:run", "far-pruning: keep the MOST similar rows"),
    "core": Verb("split:Core", "stages.split:run", "keep the rows most similar to several test sets"),
    "random": Verb("split:Random", "stages.split:run", "keep a uniform sample"),
    "threshold": Verb("split:Threshold", "stages.split:run", "remove rows above a similarity"),
    "score": Verb("split:Score", "stages.split:run", "keep rows by CLIP score, resolution or another column"),
    "density-match": Verb("split:DensityMatch", "stages.split:run", "no closer and no denser than the reference"),
    "equalise": Verb("split:Equalise", "stages.split:run", "two groups of a test set see the same similarity"),
    "preview": Verb("split:PreviewSettings", "stages.preview:run", "what a cut would keep, before anything is cut"),
    "full": Verb("split:Full", "stages.split:run", "keep every scored row"),
    "dedup": Verb("subsets:DedupSplit", "stages.subsets:dedup", "keep what a deduplication keeps"),
    "and": Verb("subsets:And", "stages.subsets:combine", "keep what all of several splits keep"),
    "or": Verb("subsets:Or", "stages.subsets:combine", "keep what any of several splits keeps"),
    "minus": Verb("subsets:Minus", "stages.subsets:combine", "keep what the first split keeps and no other does"),
    "join": Verb("subsets:JoinSettings", "stages.subsets:join", "turn somebody's id list into a split of a pool"),
    "ids": Verb("subsets:IdsSettings", "stages.subsets:ids", "write a split as LAION keys, or as a table"),
    "show": Verb("subsets:ShowSettings", "stages.subsets:show", "counts, coverage and inputs of a split"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Other people's libraries log through the root logger (open_clip narrates every model it builds).
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clipgap").setLevel(logging.INFO)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except ClipgapError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command continues from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return EXIT_ERROR


def _reader_has_gone() -> bool:
    """Whether it is stdout that broke (`clipgap --help | head`): a pipe without a reader reports an error."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage("clipgap", {**VERBS, "split": Verb("", "", "cut a split: gap-match, near, far, core, ...")}))
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    name, rest, verbs = words[0], words[1:], VERBS
    if name == "split":
        if not rest or rest[0] in ("-h", "--help"):
            print(_usage("clipgap split", SPLITS))
            return 0
        name, rest, verbs = rest[0], rest[1:], SPLITS
    if name not in verbs:
        near = difflib.get_close_matches(name, [*verbs, "split"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "clipgap --help lists the commands"
        raise ConfigError(f"{name!r} is no command", hint=hint)
    prog = f"clipgap split {name}" if verbs is SPLITS else f"clipgap {name}"
    return _run(prog, verbs[name], rest)


def _run(prog: str, verb: Verb, words: list[str]) -> int:
    import tyro

    settings_class = _load("clipgap_ray.config." + verb.settings)
    try:
        settings = tyro.cli(settings_class, prog=prog, args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        return EXIT_ERROR if stop.code else 0
    except pydantic.ValidationError as error:
        from clipgap_ray.config.base import explain

        raise explain(error, settings_class, prog) from None
    if hasattr(settings, "limits"):
        _load("clipgap_ray.stages.limits:start")(settings.limits)
    result = _load("clipgap_ray." + verb.runner)(settings)
    return _finish(result, settings)


def _finish(result: Any, settings: Any) -> int:
    """Print a stage's result and derive the exit code."""
    if result is None:
        return 0
    values = result if isinstance(result, dict) else result.as_dict()
    print(json.dumps(values, indent=2, default=str))
    if values.get("exit_code"):
        return int(values["exit_code"])
    allowed = getattr(settings, "max_skip_fraction", None)
    predicted = isinstance(result, dict)  # `plan` has embed's settings and nothing skipped yet
    if allowed is not None and not predicted and result.dropped_share > allowed:
        share = f"{result.dropped_share:.2%}"
        print(f"complete, but {share} of the samples were skipped (allowed: {allowed:.2%})", file=sys.stderr)
        return EXIT_SKIPPED
    return 0


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _usage(prog: str, verbs: dict[str, Verb]) -> str:
    width = max(len(name) for name in verbs)
    lines = [f"usage: {prog} COMMAND [options]      ({prog} COMMAND --help explains one)", ""]
    return "\n".join(lines + [f"  {name:<{width}}  {verb.line}" for name, verb in verbs.items()])


if __name__ == "__main__":
    sys.exit(main())
