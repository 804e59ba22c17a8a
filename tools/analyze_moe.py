r"""Analyse the routing and the experts of MoE checkpoints: tables, plots and one report.

python tools/analyze_moe.py --load checkpoints --data code=data/code text=data/text --out analysis
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.command_line import Parser
from megatron_moe.errors import exit_on_usage_error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("analyze_moe.py", __doc__)
    add = parser.add_argument
    add("--load", nargs="+", required=True, metavar="DIR", help="checkpoints, of any format")
    add("--data", nargs="+", default=[], metavar="NAME=PREFIX", help="indexed datasets")
    add("--out", type=Path, required=True, metavar="DIR", help="results; those there are kept")
    add("--analyses", nargs="+", metavar="NAME", help="what to analyse (all)")
    add("--seq-length", type=int, default=1024, help="tokens of a row (1024)")
    add("--batch-size", type=int, default=8, help="rows per batch (8)")
    add("--tokens", type=int, default=200_000, help="tokens of each dataset (200000)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Open, analyse, write."""
    from megatron_moe.analysis.base import all_analyses
    from megatron_moe.analysis.opening import open_model
    from megatron_moe.analysis.run import RunOptions, analyse, compare
    from megatron_moe.analysis.sample import check_sample, read_sample
    from megatron_moe.data.progress import progress_bar

    models = [open_model(path) for path in options.load]
    sample = read_sample(
        options.data,
        tokens=options.tokens,
        seq_length=options.seq_length,
        batch_size=options.batch_size,
    )
    for model in models:
        check_sample(sample, model)
    known = all_analyses()
    analyses = [known[name] for name in options.analyses or known]
    with progress_bar(sample.tokens * len(models), "tokens") as bar:
        results = {
            model.label: analyse(model, sample, analyses, RunOptions(out=options.out), bar.update)
            for model in models
        }
    compare(analyses, results, options.out)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    with exit_on_usage_error("analyze_moe.py"):
        run(options)


if __name__ == "__main__":
    main()
