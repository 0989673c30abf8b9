"""With which prompts was every test set asked, and which comparisons does that touch?

A CLIP trained on captions of one form reads prompts of another form much worse (docs/results.md: 45 % against 77 % on
the same photos). Accuracies on two test sets that were asked differently then differ for a reason that is no shift.
`evaluate` stores a digest of the prompts with every result; classifiers know no prompts.
"""

from __future__ import annotations

from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record, arms
from clipgap_ray.reporting.variants import describe

CAUTION = (
    "A CLIP whose captions had one form reads other prompts worse, so a difference between these accuracies need not "
    "be the test set's."
)


def asked_with(study: Study) -> list[Record]:
    """Return how the CLIPs were asked: `test, arm, prompts` (in words) and `templates_sha256`, one record per test set,
    arm and prompts; none where `evaluate` left no record of them."""
    found: dict[tuple[str, str, str], Record] = {}
    for test in study.tests:
        for arm in arms(study):
            for run in arm.runs if not arm.supervised else ():
                result = study.result(run.name, test)
                digest = str((result or {}).get("templates_sha256") or "")
                if digest:
                    words = describe(result, None)[0]
                    record = {"test": test, "arm": arm.label, "prompts": words, "templates_sha256": digest}
                    found[test, arm.label, digest] = record
    return list(found.values())


def caution(records: list[Record], tests: list[str]) -> str:
    """Say which of the compared test sets were asked with different prompts; "" where all were asked alike.

    Args:
        records: Of `asked_with`.
        tests: Test sets whose accuracies stand side by side.
    """
    own = [record for record in records if record["test"] in tests]
    sets: dict[str, dict[str, list[str]]] = {}  # by prompts, then test set: the arms
    for record in own:
        sets.setdefault(record["prompts"], {}).setdefault(record["test"], []).append(record["arm"])
    if len(sets) < 2:
        return ""
    several = {test for test in tests if sum(test in by_test for by_test in sets.values()) > 1}
    parts = []
    for words, by_test in sets.items():
        names = [f"{test} ({', '.join(dict.fromkeys(arms))})" if test in several else test
                 for test, arms in by_test.items()]  # fmt: skip
        parts.append(f"{_quoted(words)} for {', '.join(names)}")
    return f"Caution: asked with different prompts, {'; '.join(parts)}. {CAUTION}"


def _quoted(words: str) -> str:
    return f"\u201c{words}\u201d" if "{c}" in words else words
