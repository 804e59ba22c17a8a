"""From records to comparisons: each variant against OpenMoE's recipe, seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from examples.experiments.paired import Paired, at_cost, holm, paired
from examples.experiments.records import Record
from examples.experiments.variants import OPENMOE

LIMIT = 0.05
"""Of corrected p-values."""
LEAST_SEEDS = 5
"""Of a variant that anything is claimed about."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against the recipe at one size; negative differences are lower losses.

    Args:
        variant, size: which.
        steps, compute, time: loss difference at equal steps, equal FLOPs done and equal time of
            the fastest steps.
        corrected: p-value of `compute`, corrected for all comparisons of its family; `None` before
            that.
    """

    variant: str
    size: str
    steps: Paired
    compute: Paired
    time: Paired
    corrected: float | None = None

    @property
    def claim(self) -> str:
        """`lower`, `higher`, or nothing, of the loss at equal compute."""
        few = self.compute.n < LEAST_SEEDS
        if few or self.corrected is None or self.corrected > LIMIT:
            return ""
        return "lower" if self.compute.mean < 0 else "higher"


def gain(records: Iterable[Record], cost: str) -> list[tuple[float, float]]:
    """The recipe at its lengths: cost, and loss less that of length 1, means over seeds.

    Of seeds that have all lengths; what a seed does to all of them cancels in the difference.

    Args:
        records: of the recipe at one size.
        cost: key of what is spent.
    """
    rows = list(records)
    lengths = sorted({r["length"] for r in rows})
    by = {(r["seed"], r["length"]): r for r in rows}
    seeds = [s for s in {r["seed"] for r in rows} if all((s, x) in by for x in lengths)]
    return [
        (
            fmean(by[s, x][cost] for s in seeds),
            fmean(by[s, x]["loss"] - by[s, 1.0]["loss"] for s in seeds),
        )
        for x in lengths
    ]


def compare(records: Sequence[Record], size: str, base: str = OPENMOE) -> list[Comparison]:
    """Variants of one size with two seeds or more, in the order of the records; p-values not
    corrected yet.

    Args:
        records: of runs; of ``base`` with at least two lengths.
        size: of the model.
        base: what the others are compared with.
    """
    mine = [r for r in records if r["size"] == size]
    of_base = [r for r in mine if r["variant"] == base]
    whole = {r["seed"]: r for r in of_base if r["length"] == 1}
    per_step = min(r["ms_per_step"] for r in whole.values())
    by_compute = gain(of_base, "done")
    by_time = [(steps * per_step, loss) for steps, loss in gain(of_base, "steps")]
    found = []
    for variant in dict.fromkeys(r["variant"] for r in mine):
        own = [r for r in mine if r["variant"] == variant and r["length"] == 1]
        own = [r for r in own if r["seed"] in whole]
        if variant == base or len(own) < 2:
            continue
        own_step = min(r["ms_per_step"] for r in own)
        steps, compute, time = [], [], []
        for record in own:
            difference = record["loss"] - whole[record["seed"]]["loss"]
            steps.append(difference)
            done = record["done"] + record["orthogonal"]
            compute.append(difference - at_cost(by_compute, done))
            time.append(difference - at_cost(by_time, record["steps"] * own_step))
        found.append(
            Comparison(
                variant=variant,
                size=size,
                steps=paired(steps),
                compute=paired(compute),
                time=paired(time),
            )
        )
    return found


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p-values at equal compute corrected for their number (Holm).

    All that was looked at counts, also what has too few seeds for a claim: which variants got more
    seeds may have been decided by the first ones.

    Args:
        comparisons: a family of tests.
    """
    p = holm({f"{each.size} {each.variant}": each.compute.p for each in comparisons})
    return [replace(each, corrected=p[f"{each.size} {each.variant}"]) for each in comparisons]


def means(records: Iterable[Record], keys: Sequence[str]) -> Mapping[str, float | None]:
    """Means over records of numbers that may be absent."""
    found: dict[str, float | None] = {}
    rows = list(records)
    for key in keys:
        known = [r[key] for r in rows if r[key] is not None]
        found[key] = fmean(known) if known else None
    return found
