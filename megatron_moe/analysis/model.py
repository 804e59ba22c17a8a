"""The model that is analysed, whatever its format: sizes, weights on demand, forward passes.

`open_model` in `opening.py` finds out what a directory is. `MoEModel` reads tensors one at a time
when they are needed, so that analyses of weights work on models larger than memory; `MoERunner`
holds a loaded model for forward passes.

Shapes: T tokens, E experts, F width of an expert, H hidden. Matrices are [out, in].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.convert.model import LazyTensor
from megatron_moe.errors import UsageError


@dataclass(frozen=True)
class ExpertWeights:
    """`down(act(gate x) * up x)`: gate and up [F, H], down [H, F].

    Released OpenMoE has a third projection: `down(linear x * silu(gate x) * up x)`; `linear` is
    `None` elsewhere. GPT-OSS adds a bias to each projection, [F], [F] and [H]; else `None`.
    """

    gate: LazyTensor
    up: LazyTensor
    down: LazyTensor
    linear: LazyTensor | None = None
    gate_bias: LazyTensor | None = None
    up_bias: LazyTensor | None = None
    down_bias: LazyTensor | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertPass:
    """What one expert computes for T tokens, in fp32.

    Args:
        activation_TF: the activated projection, `act(gate x)`.
        inner_TF: input of the down projection.
        output_TH: output, before the router's weight.
    """

    activation_TF: Tensor
    inner_TF: Tensor
    output_TH: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of one MoE layer.

    Args:
        layer: index in the network, from 0.
        router: [E, H].
        bias: [E], added to the scores for the selection only; `None` if the rule has none.
        router_bias: [E], added to the logits; `None` if the router has none.
        experts: E of them.
        shared: the shared expert; files store several as a single wide one.
        shared_gate: [1, H], gives the logit of the sigmoid gate on the shared expert's output.
    """

    layer: int
    router: LazyTensor
    bias: LazyTensor | None
    experts: tuple[ExpertWeights, ...]
    shared: ExpertWeights | None
    shared_gate: LazyTensor | None
    router_bias: LazyTensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model.

    Args:
        num_layers: transformer layers.
        moe_layers: indices of the MoE layers, from 0.
        num_experts: E.
        topk: K.
        hidden_size: H.
        expert_width: F.
        vocab_size: ids of the embedding.
        max_length: longest row that the model was made for.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int
    hidden_size: int
    expert_width: int
    vocab_size: int
    max_length: int


class MoEModel(ABC):
    """An opened checkpoint.

    Attributes:
        label: short name, unique in a report.
        path: its directory.
        step: training step; `None` if neither the format nor the caller gives it.
        declared_run: name of its training run, if that is not what its directory says.
        family: display name of the architecture.
        routing: the routing rule in one line.
        sizes: its sizes.
        identity: hash of what decides the results: configuration, and size and time of each file.
        tokenizer_hash: hash of its tokenizer's vocabulary; empty if unknown.
    """

    label: str
    path: Path
    step: int | None
    declared_run: str = ""
    family: str
    routing: str
    sizes: Sizes
    identity: str
    tokenizer_hash: str

    @property
    def run(self) -> str:
        """What checkpoints of one training run have in common: by default, their directory."""
        return self.declared_run or str(self.path.resolve())

    @abstractmethod
    def weights(self, layer: int) -> LayerWeights:
        """The weights of an MoE layer; reads nothing yet."""

    @abstractmethod
    def dense_weights(self) -> Mapping[int, ExpertWeights]:
        """Feed-forward weights of the layers without experts, by layer; reads nothing yet."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """The text of a token id, made printable; the id in angle brackets without a tokenizer."""

    def rows_per_group(self, seq_length: int) -> int | None:
        """Rows that compete for the slots of experts; a batch has a multiple of them.

        Args:
            seq_length: tokens of a row.

        Returns:
            `None` if batches have any number of rows, of any length.

        Raises:
            UsageError: groups have a number of tokens that rows of this length do not fit.
        """
        return None

    @abstractmethod
    def load(self, device: str, dtype: torch.dtype) -> MoERunner:
        """Load the whole model."""


class MoERunner(ABC):
    """A loaded model in evaluation mode.

    Attributes:
        sizes: its sizes.
    """

    sizes: Sizes

    @abstractmethod
    def run(
        self,
        batch: TokenBatch,
        *,
        inputs: Collection[int] = (),
        places: Tensor | None = None,
        predictions: bool = False,
    ) -> Observation:
        """One forward pass, without gradients.

        Args:
            batch: the tokens.
            inputs: layers whose `inputs_NH` is recorded.
            places: indices, int64 [N], of the tokens at which it is; `None` for all T. They stay in
                memory for all layers until the pass ends: N H values of each.
            predictions: whether `predicted_T` and `loss_T` are computed.
        """

    @abstractmethod
    def expert(self, layer: int, x_TH: Tensor, expert: int) -> ExpertPass:
        """One expert on any inputs, whether or not the router would choose it, in fp32.

        Args:
            layer: index in the network.
            x_TH: inputs of the experts, as recorded.
            expert: its id.
        """

    def ranking(self, layer: int, scores_TE: Tensor) -> Tensor:
        """What the choice of a layer maximises, [T, E]: the scores, if nothing else is added.

        Args:
            layer: index in the network.
            scores_TE: of all experts, as recorded.
        """
        return scores_TE

    def expert_outputs(self, layer: int, x_TH: Tensor, experts: Sequence[int]) -> Tensor:
        """Outputs of experts before the router's weight, [len(experts), T, H] in fp32.

        Args:
            layer: index in the network.
            x_TH: inputs of the experts, as recorded.
            experts: their ids.
        """
        return torch.stack([self.expert(layer, x_TH, e).output_TH for e in experts])

    @abstractmethod
    def forced(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Within this context the layer uses these choices and combine weights.

        Args:
            layer: index in the network.
            ids_TK: experts of every token of the batches that run in the context.
            weights_TK: their combine weights.
            kept_TK: choices that find a slot; `None` for all, whatever the capacity.
        """

    @abstractmethod
    def combine_weights(self, scores_TK: Tensor) -> Tensor:
        """Combine weights that the routing rule gives chosen experts with these scores, [T, K].

        Args:
            scores_TK: of the chosen experts, as `LayerRouting.probs_TK`.
        """

    @abstractmethod
    def without(self, experts: Mapping[int, Sequence[int]]) -> AbstractContextManager[None]:
        """Within this context some experts cannot be chosen.

        They are routed as if their logits were -inf: a token that would choose one takes its next
        best expert, with the weights that the routing rule gives then. Shared experts stay.

        Args:
            experts: ids by layer.

        Raises:
            UsageError: a layer or an expert that is not there, or fewer than K experts are left.
        """


def check_experts(experts: Mapping[int, Sequence[int]], sizes: Sizes) -> None:
    """Check experts that are to be left out, by layer.

    Raises:
        UsageError: a layer without experts, an expert that is not there, or too few are left.
    """
    for layer, ids in experts.items():
        if layer not in sizes.moe_layers:
            layers = ", ".join(str(each) for each in sizes.moe_layers)
            raise UsageError("layer of an expert to leave out", layer, f"an MoE layer: {layers}")
        for expert in ids:
            if not 0 <= expert < sizes.num_experts:
                expected = f"from 0 to {sizes.num_experts - 1}"
                raise UsageError(f"expert to leave out of layer {layer}", expert, expected)
        most = sizes.num_experts - sizes.topk
        if len(set(ids)) > most:
            expected = f"at most {most}, since each token chooses {sizes.topk}"
            raise UsageError(f"experts to leave out of layer {layer}", len(set(ids)), expected)
