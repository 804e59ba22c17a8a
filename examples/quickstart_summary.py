"""Summary of the quickstart: losses, speed, and where the logs are.

    python examples/quickstart_summary.py FOLDER

Exit code 1 if the held-out loss is not well below that of a unigram model, which is what the
quickstart is meant to show.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

MARGIN = 1.0
"""Nats per token by which the held-out loss must be below the unigram model's."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The numbers of one quickstart."""

    steps: int
    first_loss: float
    last_loss: float
    """Mean of the last ten steps: one step of 2048 tokens is noisy."""
    valid_loss: float
    unigram_loss: float
    tokens_per_second: float


def read(folder: Path) -> Results:
    """Collect the results from the files of a finished quickstart."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # Evaluations have lines of their own between those of the steps.
    losses = [record["lm_loss"] for record in records if "evaluation" not in record]
    pretrain, more, unigram = (
        (folder / "logs" / f"{name}.log").read_text()
        for name in ("pretrain", "continue", "unigram")
    )
    return Results(
        steps=len(losses),
        first_loss=losses[0],
        last_loss=statistics.fmean(losses[-10:]),
        valid_loss=_numbers(r"validation at iteration \d+ \| lm loss (\S+)", more)[-1],
        unigram_loss=_numbers(r"unigram held-out loss (\S+)", unigram)[-1],
        tokens_per_second=statistics.median(_numbers(r"\| (\S+) tokens/s", pretrain)),
    )


def _numbers(pattern: str, text: str) -> list[float]:
    """Every number that ``pattern`` captures in ``text``; there must be one."""
    found = [float(value) for value in re.findall(pattern, text)]
    if not found:
        raise SystemExit(f"quickstart_summary.py: error: no {pattern!r} in the logs")
    return found


def report(results: Results, folder: Path) -> str:
    """The lines to print."""
    return "\n".join(
        (
            f"training loss   {results.first_loss:.3f} -> {results.last_loss:.3f} nats per token "
            f"in {results.steps} steps",
            f"held-out loss   {results.valid_loss:.3f}, a unigram model has "
            f"{results.unigram_loss:.3f}",
            f"speed           {results.tokens_per_second:.0f} tokens/s on 2 CPU ranks",
            f"logs            {folder}/logs, TensorBoard events in {folder}/tensorboard, "
            f"checkpoints in {folder}/checkpoint",
            f"view them       .venv/bin/tensorboard --logdir {folder}/tensorboard",
            f"its experts     {folder}/report/report.html, read it with docs/analysis.md",
        )
    )


def main() -> int:
    """Print the report; 1 if the model is not well below the unigram model."""
    folder = Path(sys.argv[1])
    results = read(folder)
    print(report(results, folder))
    if results.valid_loss > results.unigram_loss - MARGIN:
        print(f"quickstart: held-out loss must be {MARGIN} below the unigram model's")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
