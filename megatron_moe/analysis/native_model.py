"""OpenMoE under analysis: native checkpoints and the Hugging Face layout, by the reference model.

Shapes: B rows, S tokens of a row, T = B S tokens, E experts, F width, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.model import (
    ExpertPass,
    ExpertWeights,
    LayerWeights,
    MoEModel,
    MoERunner,
    Sizes,
    check_experts,
)
from megatron_moe.analysis.observation import LayerRouting, Observation, TokenBatch, at_places
from megatron_moe.analysis.rerouting import Decide, rerouted
from megatron_moe.convert import formats
from megatron_moe.convert.model import LazyTensor, LogicalModel, row_of
from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadedModel, LoadOptions, format_of, load
from megatron_moe.inference.perplexity import batch_of
from megatron_moe.inference.scoring import in_parts
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.model.logical import expert_width
from megatron_moe.model.reference import Routing
from megatron_moe.model.reference.ffn import MoE, gated
from megatron_moe.model.reference.routing import (
    capacity_factor,
    combine_weights,
    route,
)


class NativeModel(MoEModel):
    """See the module.

    Args:
        found: the checkpoint.
        options: how it is loaded; its `capacity` decides about drops.
        label: name in reports.
    """

    def __init__(self, found: LogicalModel, options: LoadOptions, label: str | None) -> None:
        config = found.config
        # The step that was found, though the run may save another one in the meantime.
        step = found.step if format_of(options) == "native" else None
        self._found, self._options = found, replace(options, step=step)
        self._tokenizer: TextTokenizer | None = None
        self.path, self.step, self.family = options.path, found.step or None, "OpenMoE"
        name = options.path.resolve().name
        self.label = label or (name if self.step is None else f"{name}@{self.step}")
        self.tokenizer_hash = found.tokenizer_hash
        self.sizes = _sizes(found)
        kind, score = config.moe.moe_router_type, config.moe.moe_router_score_function
        router = "" if kind == "linear" else f"router {kind}, "
        self.routing = f"{router}{score} over {self.sizes.num_experts}, best {self.sizes.topk}"
        self.identity = _identity(found, options)

    def weights(self, layer: int) -> LayerWeights:
        """See `MoEModel.weights`."""
        if self._found.config.moe.moe_router_type == "norm":
            expected = "one whose router has a vector for each expert, to analyse weights"
            raise UsageError("--moe-router-type", "norm", expected)
        tensors, prefix = self._found.tensors, f"layers.{layer}."
        experts = tuple(
            self._expert(*(row_of(tensors[f"{prefix}moe.experts.{n}"], e, True) for n in _MATRICES))
            for e in range(self.sizes.num_experts)
        )
        has_shared = f"{prefix}shared.gate.weight" in tensors
        return LayerWeights(
            layer=layer,
            router=tensors[f"{prefix}moe.router.weight"],
            bias=tensors.get(f"{prefix}moe.router.expert_bias"),
            experts=experts,
            shared=self._dense(f"{prefix}shared") if has_shared else None,
            shared_gate=None,
        )

    def dense_weights(self) -> Mapping[int, ExpertWeights]:
        """See `MoEModel.dense_weights`."""
        dense = (i for i in range(self.sizes.num_layers) if i not in self.sizes.moe_layers)
        return {i: self._dense(f"layers.{i}.ffn") for i in dense}

    def _dense(self, prefix: str) -> ExpertWeights:
        return self._expert(*(self._found.tensors[f"{prefix}.{n}.weight"] for n in _MATRICES))

    def _expert(self, gate: LazyTensor, up: LazyTensor, down: LazyTensor) -> ExpertWeights:
        if self._found.config.model.ffn_variant == "swiglu":
            return ExpertWeights(gate, up, down)
        # Released: [a | b] = gate x, and silu is applied to b (docs/model.md).
        width = up.shape[0]
        linear, activated = _rows(gate, 0, width), _rows(gate, width, width)
        return ExpertWeights(activated, up, down, linear)

    def piece(self, token: int) -> str:
        """See `MoEModel.piece`; pieces are known once the model is loaded."""
        return f"<{token}>" if self._tokenizer is None else str(self._tokenizer.piece(token))

    def rows_per_group(self, seq_length: int) -> int | None:
        """See `MoEModel.rows_per_group`: of `--moe-capacity-group-size`."""
        moe = self._found.config.moe
        size = moe.moe_capacity_group_size
        if size is None or capacity_factor(moe, training_capacity=False) is None:
            return None
        if seq_length % size and size % seq_length:
            expected = f"a divisor or a multiple of {size}, a capacity group of {self.label}"
            raise UsageError("--seq-length", seq_length, expected)
        return max(1, size // seq_length)

    def load(self, device: str, dtype: torch.dtype) -> NativeRunner:
        """See `MoEModel.load`."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        options = replace(self._options, device=device, dtype=names[dtype])
        try:
            loaded = load(options)
        except UsageError as error:
            if (error.what, error.found) != ("--tokenizer-model", None):
                raise
            # Weights without any tokenizer: everything but the text of tokens can be analysed.
            loaded = load(replace(options, tokenizer_type="NullTokenizer"))
        self._tokenizer = loaded.tokenizer  # and no reference to the model, which the runner owns
        return NativeRunner(loaded, self.sizes)


_MATRICES = ("gate", "up", "down")


def _rows(tensor: LazyTensor, first: int, count: int) -> LazyTensor:
    shape = (count, *tensor.shape[1:])
    return LazyTensor(shape, tensor.dtype, lambda a, b: tensor.rows(first + a, first + b))


def _sizes(found: LogicalModel) -> Sizes:
    model, moe = found.config.model, found.config.moe
    if moe.moe_layer_num_experts is not None:
        experts = " ".join(map(str, moe.moe_layer_num_experts))
        fix = "analyses compare layers with as many experts"
        raise UsageError("--moe-layer-num-experts", experts, "unset in an analysed model", fix)
    return Sizes(
        num_layers=model.num_layers,
        moe_layers=found.config.moe_layers,
        num_experts=moe.num_experts,
        topk=moe.moe_router_topk,
        hidden_size=model.hidden_size,
        expert_width=expert_width(model, moe),
        vocab_size=found.vocab_size,
        max_length=model.max_position_embeddings,
    )


def _identity(found: LogicalModel, options: LoadOptions) -> str:
    """Of configuration and files; tensors are not read."""
    folder = Path(found.source)
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    sizes = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    text = repr((found.config.to_dict(), found.step, options.capacity, sizes))
    return hashlib.sha256(text.encode()).hexdigest()


class NativeRunner(MoERunner):
    """The reference model.

    Args:
        loaded: model, configuration and tokenizer.
        sizes: its sizes.
    """

    def __init__(self, loaded: LoadedModel, sizes: Sizes) -> None:
        self.loaded, self.sizes = loaded, sizes
        parts = (module for module in loaded.model.modules() if isinstance(module, MoE))
        self._moe = {part.layer: part for part in parts}

    @torch.no_grad()
    def run(
        self,
        batch: TokenBatch,
        *,
        inputs: Collection[int] = (),
        places: Tensor | None = None,
        predictions: bool = False,
    ) -> Observation:
        """See `MoERunner.run`."""
        model, made = self.loaded.model, batch_of(batch.tokens_BS, batch.next_BS, self.loaded)
        device = model.embedding.weight.device
        planes = {
            "positions_BS": made.positions_BS,
            "documents_BS": made.documents_BS,
            "padding_BS": made.padding_BS,
        }
        recorded: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer in inputs:
                record = _recorder(recorded, layer, places)
                hooks.callback(self._moe[layer].register_forward_pre_hook(record).remove)
            x_BSH, routing = model.hidden_states(
                made.tokens_BS.to(device),
                training_capacity=False,
                **{k: None if plane is None else plane.to(device) for k, plane in planes.items()},
            )
        found = self._predictions(x_BSH, made.labels_BS) if predictions else (None, None)
        return Observation(
            # The ids that were read: a run's rows may begin with a start token.
            batch=replace(batch, tokens_BS=made.tokens_BS.numpy()),
            layers=tuple(_record(each, recorded.get(each.layer)) for each in routing),
            predicted_T=found[0],
            loss_T=found[1],
        )

    def _predictions(self, x_BSH: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        model, labels_T = self.loaded.model, labels_BS.flatten().to(x_BSH.device)
        sizes = (model.vocab_size, self.loaded.tokenizer.size)
        found, best = in_parts(model.logits, x_BSH.flatten(0, 1), labels_T, *sizes)
        return best, -found

    @torch.no_grad()
    def expert(self, layer: int, x_TH: Tensor, expert: int) -> ExpertPass:
        """See `MoERunner.expert`."""
        own, x_TH = self._moe[layer].experts, x_TH.float()
        gate, up = x_TH @ own.gate[expert].float(), x_TH @ own.up[expert].float()
        model = self.loaded.config.model
        activation = torch.nn.functional.silu(gate.chunk(model.gate_blocks, dim=-1)[-1])
        inner = gated(gate, up, model)
        output = inner @ own.down[expert].float()
        return ExpertPass(activation_TF=activation, inner_TF=inner, output_TH=output)

    @contextmanager
    def forced(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Iterator[None]:
        """See `MoERunner.forced`."""
        kept = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        counts = ids_TK.flatten().bincount(minlength=self.sizes.num_experts)
        given = {"ids_TK": ids_TK, "probs_TK": weights_TK, "kept_TK": kept, "counts_E": counts}
        with rerouted(self._moe[layer], lambda _x_TH, _rows: given):
            yield

    def combine_weights(self, scores_TK: Tensor) -> Tensor:
        """See `MoERunner.combine_weights`."""
        return combine_weights(scores_TK, self.loaded.config.moe)

    @contextmanager
    def without(self, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """See `MoERunner.without`; capacity decides anew which choices are kept."""
        check_experts(experts, self.sizes)
        with ExitStack() as contexts:
            for layer, ids in experts.items():
                if ids:
                    part = self._moe[layer]
                    contexts.enter_context(rerouted(part, _excluding(part, ids)))
            yield


def _excluding(part: MoE, ids: Sequence[int]) -> Decide:
    if part.moe.moe_router_type == "token_hash":
        reason = "its choices do not follow from scores, so that no other expert is the next best"
        raise UsageError(
            "--moe-router-type", "token_hash", "another one to leave out experts", reason
        )

    def decide(x_TH: Tensor, rows: int) -> dict[str, Any]:
        logits_TE = part.logits(x_TH.unflatten(0, (rows, -1))).flatten(0, 1)
        logits_TE[:, list(ids)] = -torch.inf
        routing = route(
            logits_TE, rows, part.moe, part.layer, training_capacity=False, bias_E=part.bias_E
        )
        return {field.name: getattr(routing, field.name) for field in fields(routing)}

    return decide


def _recorder(recorded: dict[int, Tensor], layer: int, places: Tensor | None) -> Any:
    def record(_module: Any, given: tuple[Any, ...]) -> None:
        recorded[layer] = at_places(given[0], places)

    return record


def _record(routing: Routing, inputs_NH: Tensor | None) -> LayerRouting:
    return LayerRouting(
        layer=routing.layer,
        router_probs_TE=routing.scores_TE,
        ids_TK=routing.ids_TK,
        probs_TK=routing.scores_TE.gather(1, routing.ids_TK),
        weights_TK=routing.probs_TK,
        kept_TK=routing.kept_TK,
        counts_E=routing.counts_E,
        inputs_NH=inputs_NH,
    )


def open_native_model(path: Path, step: int | None, label: str | None) -> NativeModel:
    """Open a native checkpoint, or OpenMoE weights in the Hugging Face layout.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    options = LoadOptions(path=path, step=step, capacity="eval")
    return NativeModel(formats.read(format_of(options), path, step), options, label)
