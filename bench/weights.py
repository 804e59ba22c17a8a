"""What analyses of weights take: memory and time for one MoE layer of the largest model.

    python -m bench.weights

Weights have the widths of released 34B/32E in bf16, all 32 experts: 10 GB in one layer. They are
made when they are read, so no file is written, and reading costs no disk access; see
`weights_from_files.py` for a checkpoint on disk. Memory does not grow with the layers, of which one
is kept at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.convert import Peak, synthetic_model
from bench.record import Record
from megatron_moe.analysis.base import Analysis, Material, all_analyses
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.native_model import NativeModel
from megatron_moe.analysis.sample import Sample
from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.model import LogicalModel
from megatron_moe.inference.loading import LoadOptions

MEMORY = 16.0
"""GB: the bound for analysing the weights of 34B/32E."""
VOCAB = 4096
_ELEMENTS = 1_000_003
"""Of the values that tensors repeat: a prime, so that no two experts or neurons are equal."""


def layer_of_34b() -> LogicalModel:
    """A dense layer and an MoE layer of 34B/32E; weights take no memory until they are read."""
    run = PRESETS["openmoe-34b-32e-released"]
    moe = replace(run.moe, moe_layer_freq="[0,1]")
    config = replace(RunConfig(), model=replace(run.model, num_layers=2), moe=moe)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_ELEMENTS, generator=generator).bfloat16()
    return synthetic_model(config, VOCAB, values)


def measured(model: MoEModel, name: str) -> list[Record]:
    """Memory and time of the reading that all analyses share, then of each of them.

    Args:
        model: the checkpoint.
        name: beginning of the records' names.
    """
    sample = Sample(domains=(), seq_length=1, batch_size=1)
    setting = Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=0)
    material = Material(model=model, setting=setting, collected={}, runner=None, draws=200)
    found = _records(f"{name}/reading", lambda: material.survey)
    for key, analysis in all_analyses().items():
        if analysis.group == "weights":
            found += _records(f"{name}/{key}", lambda each=analysis: _compute(each, material))  # type: ignore[misc]
    return found


def records() -> list[Record]:
    """Of weights that are made when they are read."""
    model = NativeModel(layer_of_34b(), LoadOptions(path=Path("synthetic")), "synthetic")
    return measured(model, "weights")


def _compute(analysis: Analysis, material: Material) -> None:
    analysis.compute(material)


def _records(name: str, action: Callable[[], object]) -> list[Record]:
    with Peak() as peak:
        before = time.perf_counter()
        action()
        seconds = time.perf_counter() - before
    target, met = f"<= {MEMORY:g}", peak.gb <= MEMORY
    return [
        Record(name=f"{name}/peak memory", value=peak.gb, unit="GB", target=target, met=met),
        Record(name=f"{name}/time of a layer", value=seconds, unit="s"),
    ]


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
