"""What each FP8 recipe does to loss, drops and routing of the quickstart's model, by emulation.

    python -m examples.experiments.fp8_recipes --out fp8_recipes --record recipes.json
    python -m examples.experiments.fp8_recipes --record recipes.json --page docs/fp8.md

Every run is `pretrain_openmoe.py` with the flags of the quickstart, shorter, on one process (by
`bf16_products.py`). Runs of one seed start from the same weights and read the same rows; they
differ in the precision of GEMMs alone. Each ends with a phase whose learning rate is 0, on text
that none was trained on: there its loss, its drops at training capacity and every choice of every
token are recorded. The fp32 run differs from the bf16 run by rounding only: that difference is the
noise that a recipe is compared with. For the direct effect, the weights of the bf16 run pass over
the same text in FP8, without any training in it.

Runs that the record has are not repeated, so an interrupted batch continues, and a shorter one can
be extended with more seeds and arms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.experiments.lab import ROOT, tool
from examples.experiments.paired import paired
from megatron_moe.moe.trace import Trace, read_step

BEGIN, END = "<!-- table of examples/experiments/fp8_recipes.py -->", "<!-- end of table -->"
HELD_OUT_ROWS = 20
"""One document in so many is held out."""
LEAST_SEEDS = 3
"""Of a row of the table."""

FP8 = ("--bf16", "--fp8-emulate", "--fp8-format")
TRAINED: dict[str, tuple[str, ...]] = {
    "bf16": ("--bf16",),
    "fp32": (),
    "tensorwise, e4m3": (*FP8, "e4m3", "--fp8-recipe", "tensorwise"),
    "tensorwise, hybrid": (*FP8, "hybrid", "--fp8-recipe", "tensorwise"),
    "delayed, e4m3": (*FP8, "e4m3", "--fp8-recipe", "delayed"),
    "delayed, hybrid": (*FP8, "hybrid", "--fp8-recipe", "delayed"),
    "blockwise, e4m3": (*FP8, "e4m3", "--fp8-recipe", "blockwise"),
    "mxfp8, e4m3": (*FP8, "e4m3", "--fp8-recipe", "mxfp8"),
}
"""Arm -> flags of a run that is trained so."""
DIRECT = ("tensorwise, hybrid", "delayed, hybrid", "blockwise, e4m3", "mxfp8, e4m3")
EVALUATED: dict[str, tuple[str, ...]] = {
    "bf16, other kernels": ("--bf16", "--kernel-impl", "reference"),
    **{arm: TRAINED[arm] for arm in DIRECT},
}
"""Arm -> flags in which the weights of the bf16 run are evaluated; the format of gradients plays no
part."""
ARMS: dict[str, dict[str, tuple[str, ...]]] = {"trained": TRAINED, "evaluated": EVALUATED}
NOISE = {"trained": "fp32", "evaluated": "bf16, other kernels"}
"""By kind of run the arm that differs from bf16 by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Lengths of every run; runs of other sizes are not comparable."""

    steps: int = 32
    """Of training."""
    rows: int = 2
    """Sequences of 256 tokens of a step of training."""
    held_out_rows: int = 4
    """The same on held-out text."""
    settling: int = 1
    """Steps with learning rate 0 before the recorded ones: delayed scales follow."""
    recorded: int = 2
    """Steps that are recorded."""

    @property
    def held_out(self) -> range:
        """Recorded steps of a run that has no others before the settling ones."""
        return range(self.settling + 1, self.settling + self.recorded + 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run on held-out text."""

    loss: float
    """Nats per token."""
    dropped: float
    """Share of choices without a slot, at training capacity."""
    agreement: float
    """Share of choices that the bf16 run of the same seed makes as well, over tokens and layers."""


def command(*arguments: str | Path) -> None:
    """Run a program of the checkout; its output goes to standard error."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)


def prepare(out: Path) -> None:
    """Corpus, tokenizer and tokenized data as the quickstart's, with held-out documents apart."""
    if (out / "data" / "ready").exists():
        return
    corpus, data = out / "corpus", out / "data"
    data.mkdir(parents=True, exist_ok=True)
    tool("make_demo_corpus", "--output-dir", corpus)
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for domain in ("code", "text"):
        lines = (corpus / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines):
            parts["train" if number % HELD_OUT_ROWS else "held_out"].append(line)
    for name, lines in parts.items():
        (corpus / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model = out / "tokenizer.model"
    texts = (corpus / "code.jsonl", corpus / "text.jsonl")
    tool("train_tokenizer", "--input", *texts, "--output", model, "--vocab-size", 4096)
    for name in parts:
        prefix = ("--input", corpus / f"{name}.jsonl", "--output-prefix", data / name)
        tool("preprocess_data", *prefix, *_tokenizer(out), "--append-eod", "--workers", 1)
    (data / "ready").touch()


def _tokenizer(out: Path) -> list[str]:
    model = str(out / "tokenizer.model")
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]


def _phases(out: Path, sizes: Sizes, trained: int) -> Path:
    """The table of a run: ``trained`` steps of training, and the held-out text with rate 0."""
    held_out = out / "data" / "held_out_text_document"
    training = f'[[stage]]\nname = "training"\nuntil-iteration = {trained}\n\n'
    text = f"""[[stage]]
name = "held-out"
until-iteration = {trained + sizes.settling + sizes.recorded}
data-path = ["{held_out}"]
split = "100,0,0"
seed = 1
micro-batch-size = {sizes.held_out_rows}
global-batch-size = {sizes.held_out_rows}
lr = 0.0
min-lr = 0.0
lr-decay-style = "constant"
"""
    path = out / f"phases-{trained}.toml"
    path.write_text((training if trained else "") + text, encoding="utf-8")
    return path


def run(out: Path, sizes: Sizes, seed: int, arm: str, weights: Path | None) -> Path:
    """One run; returns its folder. With ``weights`` it is evaluated, not trained."""
    trained = 0 if weights else sizes.steps
    kind = "evaluated" if weights else "trained"
    folder = out / "runs" / f"{seed}-{kind}-{arm.replace(', ', '-').replace(' ', '-')}"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.mkdir(parents=True)
    metrics = folder / "metrics.jsonl"
    first, last = trained + sizes.settling + 1, trained + sizes.settling + sizes.recorded
    flags: list[str | Path] = [
        "--preset", "openmoe-tiny-released", *_tokenizer(out), "--split", "100,0,0",
        "--data-path", out / "data" / "train_text_document", "--seed", str(seed),
        "--micro-batch-size", str(sizes.rows), "--global-batch-size", str(sizes.rows),
        "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine",
        "--lr-warmup-iters", "10", "--lr-decay-iters", str(sizes.steps), "--eval-iters", "0",
        "--phases", _phases(out, sizes, trained), "--metrics-file", metrics,
        "--routing-trace-dir", folder / "trace", "--routing-trace-steps", f"{first}:{last}",
    ]  # fmt: skip
    if weights:
        flags += ["--load", weights, "--finetune"]
    elif arm == "bf16":
        flags += ["--save", folder / "checkpoint", "--no-save-optim"]
    command("examples/experiments/bf16_products.py", *flags, *ARMS[kind][arm])
    (folder / "done").touch()
    return folder


def traces(folder: Path, sizes: Sizes, trained: int) -> list[Trace]:
    """The recorded steps, rows by layer, sequence and position."""
    steps = (trained + step for step in sizes.held_out)
    found = []
    for step in steps:
        found.append(read_step(folder / "trace", step)[0].sorted())
    return found


def measured(folder: Path, sizes: Sizes, trained: int, beside: list[Trace]) -> Measured:
    """Results of a run, against the traces ``beside`` of the bf16 run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = {line["iteration"]: line for line in map(json.loads, lines) if "lm_loss" in line}
    losses = [steps[trained + step]["lm_loss"] for step in sizes.held_out]
    own = traces(folder, sizes, trained)
    for mine, other in zip(own, beside, strict=True):
        if (mine.token_id != other.token_id).any():
            raise SystemExit(f"fp8_recipes.py: {folder} has read other text than the bf16 run")
    return Measured(
        loss=statistics.fmean(losses),
        dropped=1.0 - statistics.fmean(float(np.mean(trace.kept)) for trace in own),
        agreement=statistics.fmean(
            agreement(mine.experts, other.experts) for mine, other in zip(own, beside, strict=True)
        ),
    )


def agreement(one_NK: npt.NDArray[Any], other_NK: npt.NDArray[Any]) -> float:
    """The share of choices that are among the other's choices for the same token and layer."""
    same_NKK = one_NK[:, :, None] == other_NK[:, None, :]
    return float(same_NKK.any(2).mean())


def batch(
    out: Path, record: Path, seeds: Sequence[int], kinds: Sequence[str], arms: Sequence[str]
) -> None:
    """All runs of all seeds, one after the other; the record is written after each."""
    prepare(out)
    sizes = Sizes()
    content: dict[str, Any] = {"sizes": asdict(sizes), "trained": {}, "evaluated": {}}
    if record.exists():
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["sizes"] != asdict(sizes):
            raise SystemExit(f"fp8_recipes.py: {record} has runs of other sizes: remove it")
    for seed in seeds:
        for kind in kinds:
            wanted = [arm for arm in ARMS[kind] if not arms or arm in arms]
            done = content[kind].setdefault(str(seed), {})
            for arm in [arm for arm in wanted if arm not in done]:
                base = run(out, sizes, seed, "bf16", None)
                beside = traces(base, sizes, sizes.steps)
                weights = base / "checkpoint" if kind == "evaluated" else None
                folder = run(out, sizes, seed, arm, weights)
                trained = 0 if weights else sizes.steps
                done[arm] = asdict(measured(folder, sizes, trained, beside))
                record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Interval:
    """The mean of a value over seeds, and half the width of its 95% confidence interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """By Student's t; seeds are independent."""
        found = paired(values)
        return cls(found.mean, found.high - found.mean)

    def text(self, digits: int) -> str:
        """A cell; bold where the interval does not hold 0."""
        found = f"{self.mean:+.{digits}f} ± {self.half:.{digits}f}"
        return f"**{found}**" if abs(self.mean) > self.half else found


def table(content: dict[str, Any]) -> str:
    """Both tables of the page; each row over the seeds that have its runs."""
    parts = []
    for kind, first in (
        ("trained", "trained and run in"),
        ("evaluated", "weights of bf16, run in"),
    ):
        lines = [
            f"| {first} | seeds | loss, nats a token | minus bf16 | dropped, % | minus bf16 "
            "| choices as bf16's, % | minus rounding's |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = [row for arm in ARMS[kind] if (row := _row(content, kind, arm))]
        if rows:
            parts.append("\n".join([*lines, *rows]))
    return "\n\n".join(parts)


def _row(content: dict[str, Any], kind: str, arm: str) -> str:
    """One arm beside bf16 and beside the noise; empty with fewer than three seeds."""
    others, bf16s, noisy = content[kind], content["trained"], NOISE[kind]
    seeds = [seed for seed in others if arm in others[seed] and noisy in others[seed]]
    if len(seeds) < LEAST_SEEDS:
        return ""
    own, base = [others[seed][arm] for seed in seeds], [bf16s[seed]["bf16"] for seed in seeds]
    noise = [others[seed][noisy]["agreement"] for seed in seeds]
    loss, dropped, agreed = ([one[name] for one in own] for name in Measured.__annotations__)
    more_loss = [mine - other["loss"] for mine, other in zip(loss, base, strict=True)]
    more_drops = [
        100 * (mine - other["dropped"]) for mine, other in zip(dropped, base, strict=True)
    ]
    apart = [100 * (mine - other) for mine, other in zip(agreed, noise, strict=True)]
    is_base = arm == "bf16"
    cells = [
        *(arm, str(len(seeds)), f"{statistics.fmean(loss):.4f}"),
        "" if is_base else Interval.of(more_loss).text(4),
        f"{100 * statistics.fmean(dropped):.2f}",
        "" if is_base else Interval.of(more_drops).text(2),
        "100" if is_base else f"{100 * statistics.fmean(agreed):.2f}",
        "" if is_base or arm == noisy else Interval.of(apart).text(2),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the record lacks, or write its table into a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of corpus and runs")
    parser.add_argument("--record", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 6), help="numbers")
    parser.add_argument("--kinds", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--arms", nargs="+", choices=TRAINED | EVALUATED, default=[])
    parser.add_argument("--page", type=Path, help="page whose table is written")
    options = parser.parse_args(argv)
    if options.out is not None:
        batch(options.out.resolve(), options.record, options.seeds, options.kinds, options.arms)
    if options.page is not None:
        rows = table(json.loads(options.record.read_text(encoding="utf-8")))
        before, rest = options.page.read_text(encoding="utf-8").split(BEGIN)
        page = f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"
        options.page.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
