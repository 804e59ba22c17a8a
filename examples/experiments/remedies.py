r"""Every remedy against OpenMoE's recipe: seeds paired, two sizes, the same number of steps.

OpenMoE's recipe is also run for other numbers of steps, each with a whole schedule. Between these
runs the loss of the recipe is known at the arithmetic and at the time that a remedy took, so that
remedies are compared at equal compute and at equal time as well.

    python -m examples.experiments.remedies --out experiments
    python -m examples.experiments.remedies --out experiments --variants dropless --seeds 3

    python -m examples.experiments.remedies --out experiments --variants muon --seeds 5 --extend

Finished runs are not repeated; with `--extend`, runs whose records are there are not either, and
their records stay. Records go to `examples/experiments/records/remedies.json`; tables
and plots follow from them with `python -m examples.experiments.document`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from examples.experiments.lab import BASE, ROOT, SIZES, Lab, Run, lab_of, lab_parser
from examples.experiments.records import Record, load_records, read_record, write_records
from examples.experiments.variants import OPENMOE, VARIANTS

LENGTHS = (0.75, 1.35)
"""Further lengths of OpenMoE's recipe, in those of the other runs."""
SEEDS = 5
"""Of every variant. Rates, and what `plus` combines, were chosen by runs of seed 11."""


def runs_of(lab: Lab, sizes: Iterable[str], variants: Sequence[str], seeds: int) -> list[Run]:
    """All runs, seed by seed, so that an interrupted batch has whole seeds."""
    found = []
    for seed in range(1, seeds + 1):
        for size in sizes:
            for name in variants:
                lengths = (1.0, *LENGTHS) if name == OPENMOE else (1.0,)
                for length in lengths:
                    run = Run(size=size, variant=name, flags=(), seed=seed, length=length)
                    rate = SIZES[size].adamw_lr
                    found.append(replace(run, flags=VARIANTS[name].at(lab.steps_of(run), rate)))
    return found


def key_of(record: Record) -> tuple[str, str, int, float]:
    """What identifies a run."""
    return record["size"], record["variant"], record["seed"], record["length"]


def in_order(records: Sequence[Record]) -> list[Record]:
    """By seed, size, variant and length, as `runs_of` takes them.

    Raises:
        ValueError: two of one run.
    """
    if len({key_of(record) for record in records}) < len(records):
        raise ValueError("two records of one run")
    places = {name: place for place, name in enumerate(VARIANTS)}
    sizes = list(SIZES)

    def place(record: Record) -> tuple[int, int, int, float]:
        size, variant, seed, length = key_of(record)
        return seed, sizes.index(size), places.get(variant, len(places)), abs(length - 1.0)

    return sorted(records, key=place)


def about(lab: Lab, variants: Sequence[str]) -> Mapping[str, Any]:
    """What the records were made with."""
    import torch

    describe = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "base": " ".join(BASE),
        "sizes": {
            name: {
                "hidden": size.hidden,
                "heads": size.heads,
                "steps": lab.steps or size.steps,
                "adamw_lr": size.adamw_lr,
            }
            for name, size in SIZES.items()
        },
        "flags": {name: " ".join(VARIANTS[name].flags) for name in variants},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = lab_parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="model sizes (all)")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="remedies (all)")
    add("--most", type=int, help="runs to take now (all that are left), without records")
    add("--finished", action="store_true", help="take no run; records of those that are there")
    add("--extend", action="store_true", help="keep the records that are there, and add to them")
    options = parser.parse_args(argv)
    lab = lab_of(options)
    runs = runs_of(lab, options.sizes, options.variants, options.seeds or SEEDS)
    kept: list[Record] = []
    if options.extend:
        kept = load_records("remedies")[0]
        known = {key_of(record) for record in kept}
        runs = [run for run in runs if (run.size, run.variant, run.seed, run.length) not in known]
    if options.finished:
        runs = [run for run in runs if lab.is_finished(run)]
    lab.take(runs, options.workers, options.most)
    if options.most is not None:
        return
    records = in_order([*kept, *(read_record(lab, run) for run in runs)])
    if not options.no_records:
        variants = [name for name in VARIANTS if any(r["variant"] == name for r in records)]
        print(write_records("remedies", records, about(lab, variants)))


if __name__ == "__main__":
    main()
