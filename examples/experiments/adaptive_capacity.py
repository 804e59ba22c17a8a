r"""A target drop rate against fixed capacity factors: padded rows at as many drops.

    python -m examples.experiments.adaptive_capacity --out experiments --workers 2

The model has four MoE layers, whose loads differ. A fixed factor is one number for all layers and
the whole run. Between the factors that were run, its slots are known for any drop rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from examples.experiments.lab import SIZES, Lab, Run, lab_of, lab_parser
from examples.experiments.paired import at_cost
from examples.experiments.records import Record, layers_of, write_records
from examples.experiments.remedies import about
from examples.experiments.variants import OPENMOE

SEEDS = 2
TARGET = 0.05
LAYERS = ("--num-layers", "4", "--moe-layer-freq", "[1]*4")
FACTORS = (1.5, 2.0, 2.5, 3.0, 4.0)
SETTLING = 0.25
"""The part of a run, from its start, whose drops are not held against the target: a fresh router
chooses the same experts for nearly all tokens."""


def runs_of(sizes: Sequence[str], seeds: int) -> list[Run]:
    """All runs, seed by seed."""
    flags = {"target": ("--moe-target-drop-rate", str(TARGET))}
    flags |= {f"factor-{f:g}": ("--moe-expert-capacity-factor", str(f)) for f in FACTORS}
    return [
        Run(size=size, variant=f"deep-{name}", flags=(*LAYERS, *words), seed=seed)
        for seed in range(1, seeds + 1)
        for size in sizes
        for name, words in flags.items()
    ]


def read(lab: Lab, run: Run) -> Record:
    """Drops and slots of a run, over all its steps.

    Returns:
        `drop`: share of choices; `slots`: rows of buffers per choice, which is the factor, or its
        mean; `over`: share of a layer's intervals, 5% of the run each, after `SETTLING` in which
        drops are over the target; `most`: the largest of the layers' drops over the same time.
    """
    path = lab.finished(run).with_name("routing.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "layers" in line]
    settled = [line for line in lines if line["iteration"] > SETTLING * lab.steps_of(run)]

    def total(key: str, layer: Mapping[str, Any]) -> int:
        return sum(layer[key]) if isinstance(layer[key], list) else layer[key]

    layers = layers_of(lines)
    choices, kept, slots = (sum(total(k, x) for x in layers) for k in ("load", "kept", "slots"))
    rates = [layer["drop_rate"] for layer in layers_of(settled)]
    by_layer = [
        1 - sum(total("kept", x) for x in own) / sum(total("load", x) for x in own)
        for own in zip(*(line["layers"].values() for line in settled), strict=True)
    ]
    return {
        "size": run.size,
        "variant": run.variant.removeprefix("deep-"),
        "seed": run.seed,
        "drop": 1 - kept / choices,
        "slots": slots / choices,
        "over": sum(rate > TARGET for rate in rates) / len(rates),
        "most": max(by_layer),
    }


def equal_drops(records: Sequence[Record], drop: float) -> float:
    """Slots per choice of the fixed factor that drops as much, between two that were run.

    Linear in the logarithm of the drop rate. Example: factors 2 and 3 with drops of 8% and 2% give
    2.5 at 4%.

    Args:
        records: of fixed factors, at one size and seed.
        drop: the rate, > 0.
    """
    return at_cost([(record["drop"], record["slots"]) for record in records], drop)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = lab_parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="model sizes (all)")
    options = parser.parse_args(argv)
    lab = lab_of(options)
    runs = runs_of(options.sizes, options.seeds or SEEDS)
    lab.take(runs, options.workers)
    records = [read(lab, run) for run in runs]
    if not options.no_records:
        about_runs = {**about(lab, [OPENMOE]), "layers": " ".join(LAYERS), "target": TARGET}
        print(write_records("adaptive_capacity", records, about_runs))


if __name__ == "__main__":
    main()
