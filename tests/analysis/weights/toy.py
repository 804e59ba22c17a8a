"""A model in memory whose weights a test chooses, and what an analysis gets to work on.

Shapes: L MoE layers, E experts, F width of an expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.base import Analysis, Material
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import ExpertWeights, LayerWeights, MoEModel, MoERunner, Sizes
from megatron_moe.analysis.result import Result, read_result, write_result
from megatron_moe.analysis.sample import Sample
from megatron_moe.convert.model import LazyTensor, of_tensor

Expert = Mapping[str, Tensor]
"""Matrices `up` and `gate` [F, H], `down` [H, F], perhaps `linear` [F, H]."""


def random_expert(
    width: int, hidden: int, generator: torch.Generator, linear: bool = False
) -> Expert:
    """Of white noise."""
    names = ("up", "gate", "down", *(("linear",) if linear else ()))
    shapes = {name: (hidden, width) if name == "down" else (width, hidden) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reordered(expert: Expert, order_F: Tensor) -> Expert:
    """The same function with its neurons in another order."""
    return {n: w[:, order_F] if n == "down" else w[order_F] for n, w in expert.items()}


def near(expert: Expert, noise: float, generator: torch.Generator) -> Expert:
    """A copy, each element moved."""
    return {n: w + noise * torch.randn(w.shape, generator=generator) for n, w in expert.items()}


class ToyModel(MoEModel):
    """Layers 1, 3, 5, ... are MoE layers.

    Args:
        routers: [E, H] of each.
        experts: of each.
        shared: shared expert of each; empty for none.
        dense: by layer.
    """

    label, path, step, family, routing = "toy", Path("toy"), None, "toy", "softmax"
    identity, tokenizer_hash = "toy", ""

    def __init__(
        self,
        routers: Sequence[Tensor],
        experts: Sequence[Sequence[Expert]],
        shared: Sequence[Expert] = (),
        dense: Mapping[int, Expert] | None = None,
    ) -> None:
        self.reads: dict[str, int] = {}
        self._routers, self._experts, self._shared = routers, experts, shared
        self._dense = dense or {}
        width, hidden = experts[0][0]["up"].shape
        self.sizes = Sizes(
            num_layers=2 * len(routers),
            moe_layers=tuple(range(1, 2 * len(routers), 2)),
            num_experts=len(experts[0]),
            topk=1,
            hidden_size=hidden,
            expert_width=width,
            vocab_size=10,
            max_length=10,
        )

    def weights(self, layer: int) -> LayerWeights:
        place = self.sizes.moe_layers.index(layer)
        return LayerWeights(
            layer=layer,
            router=of_tensor(self._routers[place]),
            bias=None,
            experts=tuple(
                self._lazy(f"{layer}.{e}", each) for e, each in enumerate(self._experts[place])
            ),
            shared=self._lazy(f"{layer}.shared", self._shared[place]) if self._shared else None,
            shared_gate=None,
        )

    def dense_weights(self) -> Mapping[int, ExpertWeights]:
        return {layer: self._lazy(f"dense.{layer}", each) for layer, each in self._dense.items()}

    def _lazy(self, prefix: str, expert: Expert) -> ExpertWeights:
        return ExpertWeights(**{n: self._counted(f"{prefix}.{n}", w) for n, w in expert.items()})

    def _counted(self, name: str, tensor: Tensor) -> LazyTensor:
        def rows(start: int, stop: int) -> Tensor:
            self.reads[name] = self.reads.get(name, 0) + 1
            return tensor[start:stop]

        return LazyTensor(tuple(tensor.shape), tensor.dtype, rows)

    def piece(self, token: int) -> str:
        return f"<{token}>"

    def load(self, device: str, dtype: torch.dtype) -> MoERunner:
        raise AssertionError("analyses of weights make no forward pass")


def random_model(
    layers: int = 2, experts: int = 4, width: int = 24, hidden: int = 32, seed: int = 0
) -> ToyModel:
    """Of white noise."""
    generator = torch.Generator().manual_seed(seed)
    return ToyModel(
        [torch.randn(experts, hidden, generator=generator) for _ in range(layers)],
        [[random_expert(width, hidden, generator) for _ in range(experts)] for _ in range(layers)],
    )


def upcycled_model(
    layers: int = 2, experts: int = 4, width: int = 24, hidden: int = 32, noise: float = 0.1
) -> ToyModel:
    """The experts of a layer are copies of one network, each element moved."""
    generator = torch.Generator().manual_seed(1)
    starts = [random_expert(width, hidden, generator) for _ in range(layers)]
    return ToyModel(
        [torch.randn(experts, hidden, generator=generator) for _ in range(layers)],
        [[near(start, noise, generator) for _ in range(experts)] for start in starts],
    )


def material_of(
    model: MoEModel,
    layers: Sequence[int] | None = None,
    draws: int = 50,
    seed: int = 3,
    beside: DenseModel | None = None,
) -> Material:
    """Of weights alone."""
    chosen = model.sizes.moe_layers if layers is None else tuple(layers)
    sample = Sample(domains=(), seq_length=1, batch_size=1)
    setting = Setting(sizes=model.sizes, sample=sample, layers=chosen, seed=seed)
    return Material(
        model=model, setting=setting, collected={}, runner=None, draws=draws, beside=beside
    )


def stored(analysis: Analysis, model: MoEModel, folder: Path, **options: Any) -> Result:
    """The result, written and read again, with all its figures and its reading made."""
    analysis.check(material_of(model).setting)
    result = analysis.compute(material_of(model, **options))
    write_result(folder, result, "mark")
    again = read_result(folder, "mark")
    assert again is not None
    for results in ({"a": again}, {"a": again, "b": again}):
        figures = analysis.figures(results)
        keys = [figure.key for figure in figures]
        assert len(set(keys)) == len(keys) and all(figure.panels for figure in figures)
        assert analysis.reading(results)
    return again
