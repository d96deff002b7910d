"""Tests of a comparison: paired differences with corrected p-values, and what was expected of the gate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from experiments.comparing.results_file import ENDPOINT, ENDPOINTS
from experiments.comparing.statistics import Estimate, PairedDifference, holm
from experiments.reporting.results import BASELINES, OURS, PURE, Results, Setting

Verdict = Literal["yes", "no", "undecided"]


class Comparison(NamedTuple):
    """`label` minus `baseline` on the primary endpoint."""

    setting: Setting
    label: str
    baseline: str
    difference: PairedDifference
    better: Estimate  # the chance that a run of `label` is better
    adjusted: float  # the p-value after Holm's correction


def compare_all(results: Results, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """The pairs (label, baseline) on every task, in its primary warm start; Holm's correction over all of them."""
    tests: dict[tuple[Setting, str, str], PairedDifference] = {}
    for setting, (label, baseline) in itertools.product(results.primary(), pairs):
        if difference := results.difference(setting, label, baseline, results.endpoint(setting)):
            tests[setting, label, baseline] = difference
    adjusted = holm({key: d.p_value for key, d in tests.items()})
    return [
        Comparison(*key, d, results.improvement(*key, results.endpoint(key[0])), adjusted[key])
        for key, d in tests.items()
    ]


def primary_comparisons(results: Results) -> list[Comparison]:
    """Ours against each baseline on each task, one family of tests."""
    return compare_all(results, [(OURS, baseline) for baseline in BASELINES])


def secondary_comparisons(results: Results, baseline: str) -> list[Comparison]:
    """Every contender against the baseline, task by task; the tests of one contender are a family."""
    others = [label for label in results.labels() if label != baseline]
    found = [c for label in others for c in compare_all(results, [(label, baseline)])]
    return sorted(found, key=lambda c: results.primary().index(c.setting))


@dataclass(frozen=True)
class Claim:
    """What was expected of the gate. `relation` is to each of `against`, or `between` the two."""

    text: str
    key: str
    relation: Literal["at least", "at most", "above", "below", "between"]
    against: tuple[str, ...] = PURE


CLAIMS = (
    Claim("accuracy at least that of both pure methods", ENDPOINT, "at least"),
    Claim("forward KL on the teacher's completions at most that of both pure methods", "forward_kl", "at most"),
    Claim("entropy between theirs", "entropy", "between"),
    Claim("diversity between theirs", "distinct_ways", "between"),
    Claim("higher accuracy on the hardest problems in distribution", "hardest", "above"),
    Claim("higher accuracy out of distribution", f"ood/{ENDPOINT}", "above"),
    Claim("a larger share of the accuracy kept out of distribution", "retention", "above"),
    Claim("steadier training: the loss oscillates less", "loss_oscillation", "below"),
    Claim("steadier training: a smaller gradient norm", "grad_norm", "below"),
    Claim("cost: the teacher writes less than for forward KL", "teacher_share", "below", ("fkl",)),
)


@dataclass(frozen=True)
class Finding:
    """A claim in one setting: ours minus each of the others in the metric `key`, and whether the claim is true."""

    claim: Claim
    setting: Setting
    key: str
    differences: dict[str, PairedDifference]
    verdict: Verdict


def judge(estimates: Iterable[Estimate], at_least: bool = False) -> Verdict:
    """The verdict from differences that are positive where the claim is true.

    Yes if every interval lies above 0 (or from 0 on, with `at_least`), no if one lies below, and otherwise undecided,
    also without an interval.
    """
    bounds = [(e.low, e.high) for e in estimates]
    if bounds and all(low > 0 or (at_least and low == 0) for low, _ in bounds):
        return "yes"
    return "no" if any(high < 0 for _, high in bounds) else "undecided"


def findings(results: Results, setting: Setting) -> list[Finding]:
    """Every claim for which there are measurements; of those about an endpoint, the one about the primary one."""
    found = []
    for claim in CLAIMS:
        if claim.key in ENDPOINTS and claim.key != results.endpoint(setting):
            continue
        key = f"{ENDPOINT}/{max(results.buckets(setting), default='')}" if claim.key == "hardest" else claim.key
        differences = {b: d for b in claim.against if (d := results.difference(setting, OURS, b, key))}
        if differences:
            found.append(Finding(claim, setting, key, differences, verdict(claim, differences)))
    return found


def verdict(claim: Claim, differences: dict[str, PairedDifference]) -> Verdict:
    """Whether a claim is true, by ours minus each of the others."""
    estimates = [d.estimate for d in differences.values()]
    if claim.relation == "between":
        # ours - lower > 0 and upper - ours > 0; ours differs least from the upper one
        lower, upper = max(estimates, key=lambda e: e.value), min(estimates, key=lambda e: e.value)
        estimates = [lower, upper.scaled(-1)]
    elif claim.relation in ("below", "at most"):
        estimates = [e.scaled(-1) for e in estimates]
    found = judge(estimates, claim.relation in ("at least", "at most"))
    half_known = len(differences) < len(claim.against) and (found == "yes" or claim.relation == "between")
    return "undecided" if half_known else found
