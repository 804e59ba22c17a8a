"""Analyse checkpoints: what has to be computed, in order, and where the results lie.

    OUT/<label>/<analysis>/result.json, *.csv, arrays.npz    a checkpoint's results
    OUT/<label>/pass/<collector>.npz                         state of the pass over the tokens
    OUT/compared/<analysis>/result.json, *.csv, arrays.npz   several checkpoints together
    OUT/figures/<analysis>/<figure>.png, .svg
    OUT/report.html

A result that is there and was decided by the same things is not computed again, so that a run that
was interrupted continues, and further analyses or checkpoints are added to a report.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moe import __version__
from megatron_moe.analysis.base import Analysis, Material
from megatron_moe.analysis.collector import Collector, Setting, make_collector
from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.result import Result, read_result, write_result
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.stream import stream

PASS = "pass"
COMPARED = "compared"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What all analyses of a run share.

    Args:
        out: directory of the results.
        device: of the model.
        dtype: of its weights and activations.
        layers: MoE layers to analyse; `None` for all.
        seed: of everything that is drawn.
        draws: random draws of a permutation test or bootstrap.
        beside: a dense model whose layers are compared with the experts.
    """

    out: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layers: tuple[int, ...] | None = None
    seed: int = 1234
    draws: int = 200
    beside: DenseModel | None = None


def check_all(
    models: Sequence[MoEModel], sample: Sample, analyses: Sequence[Analysis], options: RunOptions
) -> None:
    """Check every analysis of every checkpoint, before the first of them takes hours.

    Args:
        models: the checkpoints.
        sample: the tokens; without domains if no analysis needs any.
        analyses: what is to be computed.
        options: see there.

    Raises:
        UsageError: the sample is too small for an analysis.
    """
    for model in models:
        setting = _setting(model, sample, options)
        for each in analyses:
            each.check(setting)


def analyse(
    model: MoEModel,
    sample: Sample,
    analyses: Sequence[Analysis],
    options: RunOptions,
    advance: Callable[[int], object],
) -> dict[str, Result]:
    """The results of one checkpoint, by key of the analysis.

    Args:
        model: the checkpoint.
        sample: the tokens; without domains if no analysis needs any.
        analyses: what to compute.
        options: see there.
        advance: called with the number of steps done, of `steps_of`.
    """
    folder = options.out / model.label
    marks = {each.key: _fingerprint(model, sample, each, options) for each in analyses}
    found = {key: read_result(folder / key, mark) for key, mark in marks.items()}
    results = {key: result for key, result in found.items() if result is not None}
    advance(len(results))
    missing = [each for each in analyses if each.key not in results]
    # Those that need no forward pass come first, while the model is not in memory.
    for part in (
        [each for each in missing if not each.needs_data],
        [each for each in missing if each.needs_data],
    ):
        if part:
            material = _material(model, sample, part, options, folder, advance)
        for each in part:
            results[each.key] = each.compute(material)
            write_result(folder / each.key, results[each.key], marks[each.key])
            advance(1)
    return {each.key: results[each.key] for each in analyses}


def steps_of(sample: Sample, analyses: Sequence[Analysis]) -> int:
    """Steps of `analyse` for a progress bar: the batches, and one for each analysis."""
    passes = any(each.needs_data for each in analyses)
    return len(analyses) + (sample.num_batches if passes else 0)


def compare(
    analyses: Sequence[Analysis], results: Mapping[str, Mapping[str, Result]], out: Path
) -> dict[str, Result]:
    """What several checkpoints show together, by key of the analysis; written beside their results.

    Args:
        analyses: what to compare.
        results: of each checkpoint by its label, as `analyse` returns them.
        out: directory of the results.
    """
    found = {}
    grouped = by_analysis(results)
    for each in analyses:
        combined = each.combine(grouped[each.key]) if len(grouped[each.key]) > 1 else None
        if combined is not None:
            write_result(out / COMPARED / each.key, combined, "")
            found[each.key] = combined
    return found


def _setting(model: MoEModel, sample: Sample, options: RunOptions) -> Setting:
    layers = model.sizes.moe_layers if options.layers is None else options.layers
    return Setting(sizes=model.sizes, sample=sample, layers=layers, seed=options.seed)


def _material(
    model: MoEModel,
    sample: Sample,
    analyses: Sequence[Analysis],
    options: RunOptions,
    folder: Path,
    advance: Callable[[int], object],
) -> Material:
    """What the analyses work on, after the pass over the tokens if they need one."""
    setting = _setting(model, sample, options)
    for each in analyses:
        each.check(setting)
    names = sorted({name for each in analyses for name in each.uses})
    collected: dict[str, Collector] = {name: make_collector(name, setting) for name in names}
    runner: MoERunner | None = None
    if any(each.needs_data for each in analyses):
        runner = model.load(options.device, options.dtype)
        mark = _mark(options, model.identity, sample.fingerprint, setting.layers, options.seed)
        state = folder / PASS
        stream(runner, sample, collected, state=state, fingerprint=mark, advance=advance)
    return Material(
        model=model,
        setting=setting,
        collected=collected,
        runner=runner,
        draws=options.draws,
        beside=options.beside,
    )


def _fingerprint(model: MoEModel, sample: Sample, analysis: Analysis, options: RunOptions) -> str:
    data = sample.fingerprint if analysis.needs_data else ""
    reads_dense = analysis.group == "weights" or analysis.reads_dense
    beside = options.beside if reads_dense else None
    dense = () if beside is None else (beside.label, beside.identity)
    # What others are compared by, which the user may say.
    training = (model.run, model.step) if analysis.min_checkpoints > 1 else ()
    how = (options.layers, options.seed, options.draws, dense, training)
    return _mark(options, analysis.key, model.identity, data, *how)


def _mark(options: RunOptions, *parts: object) -> str:
    """Of the parts, of how the model computes, and of the code."""
    how = (str(options.dtype), torch.device(options.device).type, code_version())
    return hashlib.sha256(repr((*parts, *how)).encode()).hexdigest()


_DRAWING = ("draw_", "report", "style", "selection", "paper")


@functools.cache
def code_version() -> str:
    """Hash of the sources that compute results; those that only draw them do not count."""
    root = Path(__file__).parent
    found = hashlib.sha256(__version__.encode())
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith(_DRAWING) and path.parent.name != "figures":
            found.update(path.read_bytes())
    return found.hexdigest()


def by_analysis(results: Mapping[str, Mapping[str, Result]]) -> dict[str, dict[str, Result]]:
    """From checkpoint -> analysis -> result to analysis -> checkpoint -> result."""
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    return {
        key: {label: found[key] for label, found in results.items() if key in found} for key in keys
    }
