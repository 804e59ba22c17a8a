r"""Analyse the routing and the experts of MoE checkpoints: tables, plots and one report.

Checkpoints of any format: a run of this project (a step with @STEP), OpenMoE weights of Hugging
Face, and the families that docs/analyses/families.md lists (@STEP says of which step they are).
Results that are there already are kept, so that an interrupted command continues and a report
grows.

    python tools/analyze_moe.py --load checkpoints --data code=data/code text=data/text --out report
    python tools/analyze_moe.py --load run@1000 run@20000 --data data/wiki --out report
    python tools/analyze_moe.py --load hf5k@5000 hf120k@120000 --same-run --data wiki --out report
    python tools/analyze_moe.py --load Mixtral-8x7B --analyses similarity matching --out weights
    python tools/analyze_moe.py --load OLMoE-1B-7B --data c4=data/c4 --figures olmoe --out report
    python tools/analyze_moe.py --load run --data data/wiki --ablate 3:17 3:4 --out ablation
    python tools/analyze_moe.py --load run --data data/wiki --routing-trace-dir traces --out traces
    python tools/analyze_moe.py --load run --data data/wiki --routing-replay-dir traces/run --out r
    python tools/analyze_moe.py --list
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.command_line import Parser
from megatron_moe.console import print_safely
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.files import is_file_name

if TYPE_CHECKING:
    from megatron_moe.analysis.base import Analysis
    from megatron_moe.analysis.dense import DenseModel
    from megatron_moe.analysis.model import MoEModel
    from megatron_moe.analysis.result import Table
    from megatron_moe.analysis.run import RunOptions
    from megatron_moe.analysis.sample import Sample


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("analyze_moe.py", __doc__)
    add = parser.add_argument_group("what to analyse").add_argument
    more = "checkpoints, each [LABEL=]DIR[@STEP]; several are overlaid"
    add("--load", nargs="+", default=[], metavar="DIR", help=more)
    more = "these labels, or all, are checkpoints of one training run in several directories"
    add("--same-run", nargs="*", action="append", default=[], metavar="LABEL", help=more)
    add("--compare", nargs=2, default=[], metavar="DIR", help="two checkpoints side by side")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="indexed datasets, a domain each",
    )
    add("--analyses", nargs="+", metavar="NAME", help="some analyses (all; see --list)")
    add("--layers", nargs="+", type=int, metavar="L", help="some MoE layers, from 0 (all)")
    more = "some experts in figures (all); tables have all"
    add("--experts", nargs="+", type=int, metavar="E", help=more)
    add("--figures", choices=("openmoe", "olmoe", "closer-look"), help="a paper's figures as well")
    add("--dense", metavar="DIR", help="a dense Llama-style model to compare the experts with")
    add("--ablate", nargs="+", metavar="LAYER:EXPERT", help="the loss without these experts")
    more = "write every choice as Parquet (docs/routing_trace.md)"
    add("--routing-trace-dir", type=Path, metavar="DIR", help=more)
    more = "the loss with the choices of such a trace, the folder of one checkpoint"
    add("--routing-replay-dir", type=Path, metavar="DIR", help=more)
    add("--list", action="store_true", help="print the analyses and exit")
    add = parser.add_argument_group("how").add_argument
    add("--out", type=Path, metavar="DIR", help="results and report.html; those there are kept")
    add("--tokens", type=int, default=1 << 20, help="most tokens of each dataset (1048576)")
    add("--seq-length", type=int, help="tokens of a row (the longest of all models, at most 2048)")
    add("--batch-size", type=int, default=8, help="rows per batch (8)")
    add("--device", default="cpu", help="PyTorch device, e.g. cuda (cpu)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the computation (fp32)")
    add("--seed", type=int, default=1234, help="of permutations and samples (1234)")
    add("--draws", type=int, default=200, help="permutations or resamples of a test (200)")
    return parser.parse_args(argv)


RESERVED = ("compared", "figures", "report.html")
"""What `--out` has besides a folder for each checkpoint."""
LONGEST_ROW = 2048
"""Tokens of a row unless `--seq-length` says more: memory of attention grows with its square."""


def check(options: argparse.Namespace) -> None:
    """Check the flags before anything is opened.

    Raises:
        UsageError: the first invalid flag.
    """
    if not options.load and not options.compare:
        raise UsageError("--load", None, "given, or --compare A B", "see --help")
    if options.load and options.compare:
        raise UsageError("--compare", " ".join(options.compare), "absent with --load")
    if options.out is None:
        raise UsageError("--out", None, "a directory for the results")
    for name in ("tokens", "batch_size", "seq_length", "draws"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}", value, ">= 1")
    if options.out.exists() and not options.out.is_dir():
        raise UsageError("--out", str(options.out), "a directory, or a new name")


def run(options: argparse.Namespace) -> None:
    """Open, analyse, write.

    Raises:
        UsageError: a flag, a checkpoint or the data is invalid.
    """
    from megatron_moe.analysis.base import all_analyses
    from megatron_moe.analysis.paper import papers

    known = all_analyses()
    if options.list:
        print_list(known.values())
        return
    check(options)
    names = options.analyses
    if names and options.figures:
        names = [*names, *(key for key in papers()[options.figures].needs if key in known)]
    analyses = selected(names, known)
    models = open_all([*options.load, *options.compare])
    declare_runs(options.same_run, models)
    check_experts(options.experts, models)
    layers = layers_of(options.layers, models)
    analyses = for_checkpoints(options, analyses, len(models))
    analyses = without_data(options, analyses)
    sample = sample_of(options, models)
    beside = dense_beside(options.dense, models)
    from megatron_moe.analysis.run import RunOptions
    from megatron_moe.inference.loading import DTYPES, check_device

    check_device(options.device)
    how = RunOptions(
        out=options.out,
        device=options.device,
        dtype=DTYPES[options.dtype],
        layers=layers,
        seed=options.seed,
        draws=options.draws,
        beside=beside,
    )
    if options.routing_trace_dir:
        trace(options.routing_trace_dir, models, sample, how)
    if options.ablate:
        ablate(options.ablate, models, sample, how)
    if options.routing_replay_dir:
        replay(options.routing_replay_dir, models, sample, how)
    if not (options.routing_trace_dir or options.ablate or options.routing_replay_dir):
        analyse_all(models, sample, analyses, how, options.figures, options.experts)


def print_list(analyses: object) -> None:
    """Print key, question and source of every analysis."""
    for each in analyses:  # type: ignore[attr-defined]
        data = "" if each.needs_data else "  (needs no --data)"
        print_safely(f"{each.key:<24} {each.question}{data}")
        print_safely(f"{'':<24} {each.source}")


def selected(names: Sequence[str] | None, known: dict[str, Analysis]) -> list[Analysis]:
    """The analyses by their names on the command line.

    Raises:
        UsageError: there is no such analysis; the known ones are listed.
    """
    for name in names or ():
        if name not in known:
            raise UsageError("--analyses", name, f"some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def open_all(words: Sequence[str]) -> list[MoEModel]:
    """Open the checkpoints `[LABEL=]DIR[@STEP]`.

    Raises:
        UsageError: one does not exist or is no MoE model, or two have the same label.
    """
    from megatron_moe.analysis.opening import open_model

    models: list[MoEModel] = []
    for word in words:
        label, path, step = parts_of(word)
        models.append(open_model(path, step, label))
    for model in models:
        check_label(model.label)
        if [other.label.casefold() for other in models].count(model.label.casefold()) > 1:
            fix = "name them: --load A=DIR B=DIR"
            raise UsageError("--load", model.label, "a different label for each checkpoint", fix)
    return models


def declare_runs(groups: Sequence[Sequence[str]], models: Sequence[MoEModel]) -> None:
    """Tell the models of each `--same-run` that they are of one training run.

    Raises:
        UsageError: an unknown label, one in two groups, or a group of fewer than two.
    """
    known = {model.label: model for model in models}
    for number, group in enumerate(groups, 1):
        labels = list(dict.fromkeys(group or known))
        for label in labels:
            if label not in known:
                raise UsageError("--same-run", label, f"some of {', '.join(known)}")
            if known[label].declared_run:
                raise UsageError("--same-run", label, "in one group only")
            known[label].declared_run = f"run {number} of --same-run"
        if len(labels) < 2:
            raise UsageError("--same-run", " ".join(labels), "labels of at least two checkpoints")


def check_label(label: str) -> None:
    """Check that a label can be the name of a folder of `--out`.

    Raises:
        UsageError: it is a path, too long, or a name that the report needs.
    """
    if not is_file_name(label) or label.casefold() in RESERVED:
        expected = f"a label that is a file name, and none of {', '.join(RESERVED)}"
        raise UsageError("--load", label, expected, "name it: --load A=DIR")


def check_experts(wanted: Sequence[int] | None, models: Sequence[MoEModel]) -> None:
    """Check the experts of `--experts`.

    Raises:
        UsageError: a model has no expert of that number.
    """
    for model in models:
        for expert in wanted or ():
            if not 0 <= expert < model.sizes.num_experts:
                expected = f"from 0 to {model.sizes.num_experts - 1}, experts of {model.label}"
                raise UsageError("--experts", expert, expected)


def dense_beside(path: str | None, models: Sequence[MoEModel]) -> DenseModel | None:
    """The dense model of `--dense`.

    Raises:
        UsageError: it cannot be read, or has another hidden size than a model.
    """
    from megatron_moe.analysis.dense import open_dense

    if path is None:
        return None
    found = open_dense(path)
    for model in models:
        if found.hidden_size != model.sizes.hidden_size:
            expected = f"a model with the hidden size of {model.label} ({model.sizes.hidden_size})"
            raise UsageError("--dense", found.hidden_size, expected)
    return found


def parts_of(word: str) -> tuple[str | None, str, int | None]:
    """Label, directory and step of `[LABEL=]DIR[@STEP]`; a directory of that name comes first."""
    if Path(word).exists():
        return None, word, None
    label, _, path = word.rpartition("=")
    if not Path(path).exists():
        before, mark, step = path.rpartition("@")
        if mark and step.isdecimal():
            return label or None, before, int(step)
    return label or None, path, None


def layers_of(wanted: Sequence[int] | None, models: Sequence[MoEModel]) -> tuple[int, ...] | None:
    """The MoE layers to analyse, ascending.

    Raises:
        UsageError: a model has no MoE layer of that number.
    """
    if wanted is None:
        return None
    for model in models:
        for layer in wanted:
            if layer not in model.sizes.moe_layers:
                known = ", ".join(map(str, model.sizes.moe_layers))
                raise UsageError("--layers", layer, f"MoE layers of {model.label}: {known}")
    return tuple(sorted(set(wanted)))


def for_checkpoints(
    options: argparse.Namespace, analyses: Sequence[Analysis], count: int
) -> list[Analysis]:
    """The analyses that so many checkpoints allow.

    Raises:
        UsageError: an analysis that was asked for compares more.
    """
    for each in analyses:
        if each.key in (options.analyses or ()) and each.min_checkpoints > count:
            expected = f"at least {each.min_checkpoints} checkpoints for --analyses {each.key}"
            raise UsageError("--load", count, expected, "e.g. --load run@1000 run@20000")
    return [each for each in analyses if each.min_checkpoints <= count]


def without_data(options: argparse.Namespace, analyses: Sequence[Analysis]) -> list[Analysis]:
    """The analyses that can run: without `--data`, those of weights.

    Raises:
        UsageError: an analysis or an ablation that was asked for needs data.
    """
    if options.data:
        return list(analyses)
    needing = [each.key for each in analyses if each.needs_data]
    asked = {
        "--ablate": options.ablate,
        "--routing-trace-dir": options.routing_trace_dir,
        "--routing-replay-dir": options.routing_replay_dir,
        f"--analyses {needing[0] if needing else ''}": options.analyses and needing,
    }
    for flag, given in asked.items():
        if given:
            raise UsageError("--data", None, f"given with {flag}", "e.g. --data text=data/text")
    if needing:
        print_safely(f"no --data: only the analyses of weights; left out: {', '.join(needing)}")
    return [each for each in analyses if not each.needs_data]


def sample_of(options: argparse.Namespace, models: Sequence[MoEModel]) -> Sample:
    """The tokens, checked against every model.

    Raises:
        UsageError: see `read_sample`, `check_sample` and `in_whole_groups`.
    """
    from megatron_moe.analysis.sample import check_sample, in_whole_groups, read_sample

    longest = min(model.sizes.max_length for model in models)
    sample = read_sample(
        options.data,
        tokens=options.tokens,
        seq_length=options.seq_length or min(LONGEST_ROW, longest),
        batch_size=options.batch_size,
    )
    if sample.domains:
        for model in models:
            check_sample(sample, model)
        sample = in_whole_groups(sample, models)
    return sample


def analyse_all(
    models: Sequence[MoEModel],
    sample: Sample,
    analyses: Sequence[Analysis],
    how: RunOptions,
    figures: str | None,
    experts: Sequence[int] | None = None,
) -> None:
    """Analyse every checkpoint, compare them, write the report.

    Raises:
        UsageError: the sample is too small for an analysis of a checkpoint; nothing is computed.
    """
    from megatron_moe.analysis.paper import papers
    from megatron_moe.analysis.report import write_report
    from megatron_moe.analysis.run import analyse, check_all, compare, steps_of
    from megatron_moe.data.progress import progress_bar

    check_all(models, sample, analyses, how)
    results = {}
    with progress_bar(steps_of(sample, analyses) * len(models), "steps") as bar:
        for model in models:
            results[model.label] = analyse(model, sample, analyses, how, bar.update)
    compared = compare(analyses, results, how.out)
    paper = papers()[figures] if figures else None
    path = write_report(
        how.out, models, sample, results, compared=compared, paper=paper, experts=experts
    )
    print_safely(f"report: {path}")


def ablate(
    words: Sequence[str], models: Sequence[MoEModel], sample: Sample, how: RunOptions
) -> None:
    """Print the losses with and without experts, by domain, and write them as a table."""
    from megatron_moe.analysis.ablation import loss_table, parse_experts

    wanted = [parse_experts(words, model.sizes) for model in models]
    for model, experts in zip(models, wanted, strict=True):
        runner = model.load(how.device, how.dtype)
        table = loss_table(runner, sample, experts, how.draws, how.seed)
        del runner  # before the next model is loaded
        show_table(table, how.out / model.label, f"{model.label} without {' '.join(words)}")


def show_table(table: Table, folder: Path, title: str) -> None:
    """Print a table, and write it as CSV in the folder of a checkpoint."""
    from megatron_moe.analysis.result import write_table

    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / f"{table.name}.csv", table)
    print_safely(title)
    for row in (tuple(table.columns), *table.rows):
        cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in row)
        print_safely("  " + "  ".join(f"{cell:>12}" for cell in cells))


def replay(directory: Path, models: Sequence[MoEModel], sample: Sample, how: RunOptions) -> None:
    """Print the losses with own choices and with those of a trace, and write them as a table."""
    from megatron_moe.analysis.replay import Replay, replay_table
    from megatron_moe.data.progress import progress_bar

    replays = [Replay(directory, model, sample) for model in models]
    tables = []
    with progress_bar(2 * sample.num_batches * len(models), "batches") as bar:
        for model, each in zip(models, replays, strict=True):
            runner = model.load(how.device, how.dtype)
            tables.append(replay_table(runner, sample, each, how.draws, how.seed, bar.update))
            del runner  # before the next model is loaded
    for model, each, table in zip(models, replays, tables, strict=True):
        show_table(table, how.out / model.label, f"{model.label} with choices of {each.producer}")


def trace(directory: Path, models: Sequence[MoEModel], sample: Sample, how: RunOptions) -> None:
    """Write the choices of every token, in a folder for each checkpoint."""
    from megatron_moe.analysis.traces import write_traces
    from megatron_moe.data.progress import progress_bar

    with progress_bar(sample.num_batches * len(models), "batches") as bar:
        for model in models:
            runner = model.load(how.device, how.dtype)
            folder = directory / model.label
            write_traces(folder, model, runner, sample, how.dtype, bar.update)
            del runner  # before the next model is loaded
    print_safely(f"traces: {directory}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    with exit_on_usage_error("analyze_moe.py"):
        run(options)


if __name__ == "__main__":
    main()
