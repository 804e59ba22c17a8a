r"""A target drop rate: is it held, and with fewer padded rows than a fixed factor needs?

A model is trained with a target and with several fixed factors, from the same weights on the same
data. Between the fixed factors the one that drops as many choices over the whole run is
interpolated; its buffers are what the target's are compared with. The runs are those of
`remedies.py`.

    python -m examples.experiments.adaptive_capacity --out experiments
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from examples.experiments import remedies
from examples.experiments.lab import SIZES, Lab, Run, lab_of, lab_parser
from examples.experiments.paired import at_cost
from examples.experiments.records import Record, read_record, write_records
from examples.experiments.variants import OPENMOE

TARGET = "target"
FIXED = (OPENMOE, "factor-2", "factor-3")
SEEDS = 2
NO_DROPS = 1e-5
"""Stands for a rate of 0, which has no logarithm."""


def runs_of(lab: Lab, size: str, seeds: int) -> list[Run]:
    """All runs, seed by seed."""
    runs = remedies.runs_of(lab, [size], [*FIXED, TARGET], seeds)
    return [run for run in runs if run.length == 1]


def savings(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each run with a target: its drops, its factor, and the fixed one with as many drops.

    Factors are means over steps, in which padded rows are linear: with rule `t5x` an
    expert has factor * tokens / experts slots for a row.
    """
    found = []
    for record in records:
        if record["variant"] != TARGET:
            continue
        fixed = [
            (max(r["drop_all"], NO_DROPS), math.log(r["factor"]))
            for r in records
            if r["variant"] in FIXED and r["seed"] == record["seed"]
        ]
        same = math.exp(at_cost(fixed, record["drop_all"]))
        found.append(
            {
                "seed": record["seed"],
                "rate": record["drop_all"],
                "factor": record["factor"],
                "fixed": same,
                "saved": 1 - record["factor"] / same,
            }
        )
    return sorted(found, key=lambda each: each["seed"])


def of_capacity(record: Record) -> Record:
    """What the claim needs of a record: drops of all steps, and the mean factor by its slots.

    The model has one MoE layer.
    """
    topk = 2
    choices = record["tokens"] * topk
    return {
        **{key: record[key] for key in ("size", "variant", "seed", "steps", "loss", "kept")},
        "slots": record["slots"],
        "drop_all": 1 - record["kept"] / choices,
        "factor": record["slots"] / record["tokens"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = lab_parser(__doc__)
    parser.add_argument("--size", default="S", choices=SIZES, help="width of the model (S)")
    options = parser.parse_args(argv)
    lab = lab_of(options)
    runs = runs_of(lab, options.size, options.seeds or SEEDS)
    lab.take(runs)
    records = [of_capacity(read_record(lab, run)) for run in runs]
    for each in savings(records):
        print(each)
    if not options.no_records:
        print(write_records("adaptive_capacity", records, remedies.about(lab, [*FIXED, TARGET])))


if __name__ == "__main__":
    main()
