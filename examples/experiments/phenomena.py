r"""The three phenomena that OpenMoE describes, each measured on a tiny OpenMoE against its null.

    python -m examples.experiments.context_independence --out experiments
    python -m examples.experiments.early_routing --out experiments
    python -m examples.experiments.drops_towards_end --out experiments

The three share their models, which are trained once: OpenMoE's recipe with checkpoints, evaluated
with the released evaluation factor 2.0, and models that are the null or the upper bound of a claim.
What is measured are the project's analyses (`tools/analyze_moe.py`, docs/analyses/routing.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.experiments.lab import SIZES, Lab, Run, lab_of, lab_parser, tool
from examples.experiments.records import Record, write_records
from examples.experiments.remedies import about
from examples.experiments.variants import OPENMOE, VARIANTS

SEEDS = 2
SAVES = 20
"""Checkpoints of a run, evenly spread."""
TOKENS = 65536
"""Of each of the two domains, at most, that an analysis reads."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where a claim's models are, and how long they train.

    Args:
        lab: data and runs.
        size: of the model.
        length: of the runs in those of the size.
        tokens: of each domain.
    """

    lab: Lab
    size: str
    length: float = 1.0
    tokens: int = TOKENS

    def run(self, variant: str, seed: int) -> Run:
        """A run of a variant that saves checkpoints."""
        name = f"saved-{variant}"
        run = Run(size=self.size, variant=name, flags=(), seed=seed, length=self.length)
        steps = self.lab.steps_of(run)
        every = max(1, steps // SAVES)
        flags = (
            *VARIANTS[variant].at(steps, SIZES[self.size].adamw_lr),
            *("--moe-eval-capacity-factor", "2.0", "--no-save-optim"),
            *("--save", str(self.checkpoints(run)), "--save-interval", str(every)),
        )
        return replace(run, flags=flags)

    def checkpoints(self, run: Run) -> Path:
        """Folder of the run's checkpoints."""
        return self.lab.folder / "checkpoints" / run.name

    def step(self, run: Run, part: float) -> int:
        """The saved step next to a part of the run."""
        steps = self.lab.steps_of(run)
        every = max(1, steps // SAVES)
        return min(steps, max(1, round(steps * part / every)) * every)

    def analyse(self, key: str, checkpoints: Mapping[str, tuple[Run, int]]) -> dict[str, Any]:
        """Numbers of an analysis by label, and of all checkpoints together as `compared`.

        Args:
            key: of the analysis.
            checkpoints: run and step by label.
        """
        out = self.lab.folder / "reports" / f"{key}-{'-'.join(checkpoints)}"
        data = self.lab.folder / "data"
        loads = [f"{k}={self.checkpoints(run)}@{step}" for k, (run, step) in checkpoints.items()]
        domains = [f"{name}={data / name}_text_document" for name in ("code", "text")]
        how = ("--tokens", self.tokens, "--seq-length", 128, "--out", out)
        if not all((out / label / key / "result.json").exists() for label in checkpoints):
            tool("analyze_moe", "--load", *loads, "--data", *domains, "--analyses", key, *how)
        found = {}
        for label in (*checkpoints, "compared"):
            path = out / label / key / "result.json"
            if path.exists():
                found[label] = json.loads(path.read_text())["numbers"]
        return found


Measure = Callable[[Study, int], Sequence[Record]]
"""Rows of a claim for one seed."""


def context_independence(study: Study, seed: int) -> Sequence[Record]:
    """How much of the routing the token's id explains; null: ids exchanged. Bound: fixed by id."""
    last = {}
    for variant in (OPENMOE, "token-hash"):
        run = study.run(variant, seed)
        last[f"{variant}-{seed}"] = (run, study.lab.steps_of(run))
    found = study.analyse("context", last)
    words = "explained by the input token, all k choices"
    return [
        {
            "seed": seed,
            "model": label.rpartition("-")[0],
            "explained": found[label][words],
            "null": found[label][f"{words}, by chance"],
        }
        for label in last
    ]


def early_routing(study: Study, seed: int) -> Sequence[Record]:
    """How much of an id's routing still moves after a part of the run."""
    run = study.run(OPENMOE, seed)
    parts = (0.05, 0.1, 0.25, 0.5, 1.0)
    saved = {f"at{part:g}": (run, study.step(run, part)) for part in parts}
    # The seed is part of the folder's name, not of the labels.
    moved = study.analyse("early_routing", {f"{k}-{seed}": v for k, v in saved.items()})
    rows = []
    for part in parts[:-1]:
        label = f"at{part:g}-{seed}"
        numbers = moved["compared"]
        rows.append(
            {
                "seed": seed,
                "part": part,
                "moves": numbers[f"choices of an id that move after {label}"],
                "between_ids": numbers["choices that differ between ids"],
                "noise": numbers["expected of noise alone"],
            }
        )
    return rows


def drops_towards_end(study: Study, seed: int) -> Sequence[Record]:
    """Tokens that lose a choice, first and last quarter of rows; null: the same at all positions,
    as a model whose drops are random has it.
    """
    last = {}
    for variant in (OPENMOE, "random"):
        run = study.run(variant, seed)
        last[f"{variant}-{seed}"] = (run, study.lab.steps_of(run))
    found = study.analyse("drops", last)
    return [
        {
            "seed": seed,
            "model": label.rpartition("-")[0],
            "mean": found[label]["tokens that lost a choice"],
            "first": found[label]["lost a choice in the first quarter of the row"],
            "last": found[label]["lost a choice in the last quarter of the row"],
            "z": found[label]["z-score of the difference"],
        }
        for label in last
    ]


def main(name: str, measure: Measure, variants: Sequence[str], argv: Sequence[str] | None) -> None:
    """The command of one claim.

    Args:
        name: of its records.
        measure: its rows.
        variants: that it needs.
        argv: the command line.
    """
    parser = lab_parser(measure.__doc__)
    add = parser.add_argument
    add("--size", default="S", choices=SIZES, help="model size (S)")
    add("--length", type=float, default=1.0, help="of a run, in the steps of a size (1)")
    add("--tokens", type=int, default=TOKENS, help=f"of each domain for analyses ({TOKENS})")
    options = parser.parse_args(argv)
    lab = lab_of(options)
    study = Study(lab=lab, size=options.size, length=options.length, tokens=options.tokens)
    seeds = range(1, (options.seeds or SEEDS) + 1)
    runs = [study.run(variant, seed) for seed in seeds for variant in variants]
    lab.take(runs, options.workers)
    rows = [row for seed in seeds for row in measure(study, seed)]
    for row in rows:
        print(json.dumps(row))
    if not options.no_records:
        steps = lab.steps_of(study.run(OPENMOE, 1))
        print(
            write_records(name, rows, {**about(lab, variants), "size": study.size, "steps": steps})
        )
