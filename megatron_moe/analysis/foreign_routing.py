"""Routing decisions of other programs' MoE models for given tokens, from their own routers.

The family's class in `transformers` computes, and forward hooks on its routers record. Field names
are those of `megatron_moe.model.reference.Routing`, so an analysis can use either.

Shapes: B rows, S tokens of a row, T = B S tokens row by row, E experts, K choices, H hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.foreign import ForeignModel
from megatron_moe.analysis.foreign_config import transformers
from megatron_moe.analysis.observation import LayerRouting, at_places
from megatron_moe.analysis.probe import check_router, probe_tokens
from megatron_moe.analysis.rule import choose, ranking_of, scores_of
from megatron_moe.errors import Corrupt, UsageError

Choices = tuple[Tensor, Tensor, Tensor]
"""What a router of `transformers` returns: logits [T, E], combine weights and ids [T, K]."""


@dataclass(frozen=True, kw_only=True)
class ForeignOutput:
    """Result of a forward pass.

    Args:
        routing: a record for each MoE layer.
        hidden_BSH: input of the output layer.
        logits_BSV: logits, if requested.
    """

    routing: list[LayerRouting]
    hidden_BSH: Tensor
    logits_BSV: Tensor | None


class ForeignRunner:
    """A model loaded for inference."""

    def __init__(self, model: ForeignModel, module: Any) -> None:
        self.model = model
        self.module = module

    def block(self, layer: int) -> Any:
        """The module that contains router and experts of a layer."""
        return self.module.model.layers[layer].mlp

    def router(self, layer: int) -> Any:
        """The router of a layer."""
        return getattr(self.block(layer), self.model.settings.family.router)

    @torch.no_grad()
    def run(
        self,
        tokens_BS: Tensor,
        *,
        inputs: bool | Collection[int] = False,
        places: Tensor | None = None,
        logits: bool = False,
    ) -> ForeignOutput:
        """One causal forward pass over full rows.

        Args:
            tokens_BS: ids, without padding.
            inputs: layers whose router's inputs are recorded; true for all.
            places: tokens, int64 [N], at which they are; `None` for all.
            logits: compute the logits of all tokens at once.

        Raises:
            UsageError: an id is not in the vocabulary.
        """
        size = self.model.settings.config.vocab_size
        outside = tokens_BS[(tokens_BS < 0) | (tokens_BS >= size)]
        if len(outside):
            raise UsageError("token id", int(outside[0]), f"from 0 to {size - 1}")
        layers = [weights.layer for weights in self.model.layers]
        recorded, hidden_BSH = self._pass(
            tokens_BS, set(layers if inputs is True else inputs or ()), places
        )
        records = [self._record(layer, *recorded[layer]) for layer in layers]
        logits_BSV = self.logits(hidden_BSH) if logits else None
        return ForeignOutput(routing=records, hidden_BSH=hidden_BSH, logits_BSV=logits_BSV)

    def _pass(
        self, tokens_BS: Tensor, inputs: set[int], places: Tensor | None = None
    ) -> tuple[dict[int, tuple[Tensor | None, Choices]], Tensor]:
        """Inputs and results of the routers by layer, and the input of the output layer."""
        recorded: dict[int, tuple[Tensor | None, Choices]] = {}
        with ExitStack() as hooks:
            for weights in self.model.layers:
                layer = weights.layer
                record = _recorder(recorded, layer, layer in inputs, places)
                hooks.callback(self.router(layer).register_forward_hook(record).remove)
            found = self.module.model(tokens_BS.to(self.module.device), use_cache=False)
        return recorded, found.last_hidden_state

    @torch.no_grad()
    def check_routers(self) -> None:
        """Check what the routers return on a few tokens; see `probe.py`.

        Raises:
            UsageError: a router does not choose by the family's rule.
        """
        settings = self.model.settings
        tokens_BS = probe_tokens(
            settings.config.vocab_size, settings.config.max_position_embeddings
        )
        recorded, _ = self._pass(tokens_BS, set(settings.moe_layers))
        for weights in self.model.layers:
            x_TH, result = recorded[weights.layer]
            assert x_TH is not None
            check_router(self.model.path, settings.rule, weights, x_TH, result)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] from inputs [.., H] of the output layer."""
        logits: Tensor = self.module.get_output_embeddings()(hidden)
        return logits

    def _record(self, layer: int, given_NH: Tensor | None, result: Choices) -> LayerRouting:
        """From the input of a router and its result."""
        logits_TE, weights_TK, ids_TK = result
        # Not every router sorts its choices. After sorting by expert, the stable sort by weight
        # breaks ties in the order of the experts.
        ids_TK, order_TK = ids_TK.sort(dim=-1)
        weights_TK = weights_TK.float().gather(1, order_TK)
        weights_TK, order_TK = weights_TK.sort(dim=-1, descending=True, stable=True)
        ids_TK = ids_TK.gather(1, order_TK)
        probs_TE = scores_of(self.model.settings.rule, logits_TE)
        return LayerRouting(
            layer=layer,
            router_probs_TE=probs_TE,
            ids_TK=ids_TK,
            probs_TK=probs_TE.gather(1, ids_TK),
            weights_TK=weights_TK,
            kept_TK=torch.ones_like(ids_TK, dtype=torch.bool),
            counts_E=ids_TK.flatten().bincount(minlength=self.model.settings.num_experts),
            inputs_NH=given_NH,
        )

    @contextmanager
    def forced(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> Iterator[None]:
        """Within this context the router of a layer gives these choices and combine weights."""

        def replace(_module: Any, _given: Any, result: Choices) -> Choices:
            logits_TE, own_TK, own_ids_TK = result
            if len(ids_TK) != len(own_ids_TK):
                raise ValueError(f"choices of {len(ids_TK)} tokens for {len(own_ids_TK)}")
            return logits_TE, weights_TK.to(own_TK), ids_TK.to(own_ids_TK)

        handle = self.router(layer).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def without(self, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """Within this context some experts cannot be chosen; see `MoERunner.without`."""
        with ExitStack() as hooks:
            for layer, ids in experts.items():
                if ids:
                    hook = self._router_without(layer, ids)
                    hooks.callback(self.router(layer).register_forward_hook(hook).remove)
            yield

    def ranking(self, layer: int, scores_TE: Tensor) -> Tensor:
        """What the router of a layer maximises, [T, E]; see `ranking_of`."""
        bias_E = self._bias(layer)
        on_device = None if bias_E is None else bias_E.to(scores_TE.device)
        return ranking_of(self.model.settings.rule, scores_TE, on_device)

    def _bias(self, layer: int) -> Tensor | None:
        weights = next(each for each in self.model.layers if each.layer == layer)
        return None if weights.bias is None else weights.bias.whole()

    def _router_without(self, layer: int, ids: Sequence[int]) -> Any:
        settings = self.model.settings
        excluded_E = torch.zeros(settings.num_experts, dtype=torch.bool)
        excluded_E[list(ids)] = True
        bias_E = self._bias(layer)

        def replace(_module: Any, _given: Any, result: Choices) -> Choices:
            logits_TE, own_TK, own_ids_TK = result
            device = logits_TE.device
            ids_TK, weights_TK = choose(
                settings.rule,
                logits_TE,
                None if bias_E is None else bias_E.to(device),
                excluded_E.to(device),
            )
            logits_TE = logits_TE.masked_fill(excluded_E.to(device), -torch.inf)
            return logits_TE, weights_TK.to(own_TK.dtype), ids_TK.to(own_ids_TK.dtype)

        return replace


def _recorder(
    recorded: dict[int, tuple[Tensor | None, Choices]],
    layer: int,
    inputs: bool,
    places: Tensor | None,
) -> Any:
    def record(_module: Any, given: tuple[Any, ...], result: Choices) -> None:
        x_NH = at_places(given[0], places) if inputs else None
        recorded[layer] = (x_NH, result)

    return record


@contextmanager
def _without_progress_bar(package: Any) -> Iterator[None]:
    """Commands show one of their own."""
    logging = package.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_foreign(
    model: ForeignModel, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> ForeignRunner:
    """Load a model into its family's class, from local files and with weights only.

    Args:
        model: from `open_foreign`.
        device: PyTorch device.
        dtype: dtype of the weights; `None` means that of its settings.

    Raises:
        UsageError: the tensors of the files are not those of the class, or its routers do not
            choose by the family's rule (see `probe.py`).
    """
    settings, package = model.settings, transformers()
    module, report = load_class(
        package,
        settings.family.model_class(package),
        model.path,
        config=settings.config,
        dtype=dtype or "auto",
        experts_implementation="eager",  # the grouped GEMM supports only some widths
    )
    check_loaded(report, model.path, settings.family.label, model.is_outside)
    runner = ForeignRunner(model, module.to(device))
    runner.check_routers()
    return runner


def load_class(package: Any, model_class: Any, path: Path, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode from local files, weights only, and what did not fit.

    Args:
        package: `transformers`.
        model_class: class of the model.
        path: directory.
        options: further arguments of `from_pretrained`.
    """
    with _without_progress_bar(package):
        module, report = model_class.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported in one line by `check_loaded`
            output_loading_info=True,
            **options,
        )
    return module.eval().requires_grad_(False), report


def check_loaded(
    report: Any, path: Path, label: str, is_outside: Callable[[str], bool] = lambda name: False
) -> None:
    """Check that all tensors were found: `from_pretrained` draws missing ones and only warns.

    Args:
        report: from `load_class`.
        path: directory.
        label: name of the family.
        is_outside: whether a tensor is known not to belong to the network.

    Raises:
        UsageError: tensors are missing, unexpected or of another shape.
    """
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        inside = [str(name) for name in report[fault] if not is_outside(str(name))]
        if inside:
            names = ", ".join(sorted(inside)[:5])
            found = f"{fault.replace('_', ' ')}: {names}"
            raise Corrupt(str(path), found, f"a checkpoint with the tensors of {label}")
