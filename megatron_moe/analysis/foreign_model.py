"""Other programs' families under analysis: adapter of `foreign` and `foreign_routing`.

Shapes: T tokens, E experts, K choices, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.foreign import ForeignModel, describe_routing, open_foreign
from megatron_moe.analysis.foreign_routing import ForeignRunner, load_foreign
from megatron_moe.analysis.model import (
    ExpertPass,
    ExpertWeights,
    LayerWeights,
    MoEModel,
    MoERunner,
    Sizes,
    check_experts,
)
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.rule import combined
from megatron_moe.inference.scoring import in_parts


class ForeignMoEModel(MoEModel):
    """See the module.

    Args:
        found: the opened directory.
        step: training step, as the user knows it.
        label: name in reports.
    """

    def __init__(self, found: ForeignModel, step: int | None, label: str | None) -> None:
        settings = found.settings
        config, family = settings.config, settings.family
        self._found = found
        self._layers = {weights.layer: weights for weights in found.layers}
        self.path, self.step, self.family = found.path, step, family.label
        self.label = label or found.path.resolve().name + ("" if step is None else f"@{step}")
        self.routing = describe_routing(settings)
        self.sizes = Sizes(
            num_layers=config.num_hidden_layers,
            moe_layers=settings.moe_layers,
            num_experts=settings.num_experts,
            topk=settings.rule.topk,
            hidden_size=config.hidden_size,
            expert_width=getattr(config, family.width),
            vocab_size=config.vocab_size,
            max_length=config.max_position_embeddings,
        )
        files = sorted(file for file in found.path.iterdir() if file.is_file())
        sizes = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        self.identity = hashlib.sha256(repr(sizes).encode()).hexdigest()

    @cached_property
    def _tokenizer(self) -> Any:
        from megatron_moe.config import DataConfig
        from megatron_moe.tokenizer.build import build_tokenizer
        from megatron_moe.tokenizer.files import files_in, settings_for

        settings = settings_for(DataConfig(), files_in(self.path))
        return None if settings is None else build_tokenizer(settings)

    @cached_property
    def tokenizer_hash(self) -> str:  # type: ignore[override]
        """See `MoEModel`."""
        return "" if self._tokenizer is None else str(self._tokenizer.identity)

    def weights(self, layer: int) -> LayerWeights:
        """See `MoEModel.weights`."""
        return self._layers[layer]

    def dense_weights(self) -> Mapping[int, ExpertWeights]:
        """See `MoEModel.dense_weights`."""
        return self._found.dense

    def piece(self, token: int) -> str:
        """See `MoEModel.piece`."""
        return f"<{token}>" if self._tokenizer is None else self._tokenizer.detokenize([token])

    def load(self, device: str, dtype: torch.dtype) -> ForeignMoERunner:
        """See `MoEModel.load`."""
        return ForeignMoERunner(load_foreign(self._found, device=device, dtype=dtype), self.sizes)


class ForeignMoERunner(MoERunner):
    """The family's class of `transformers`, with hooks.

    Args:
        runner: the loaded model.
        sizes: its sizes.
    """

    def __init__(self, runner: ForeignRunner, sizes: Sizes) -> None:
        self._runner, self.sizes = runner, sizes

    def run(
        self,
        batch: TokenBatch,
        *,
        inputs: Collection[int] = (),
        places: Tensor | None = None,
        predictions: bool = False,
    ) -> Observation:
        """See `MoERunner.run`."""
        found = self._runner.run(torch.from_numpy(batch.tokens_BS), inputs=inputs, places=places)
        best, loss = self._predictions(found.hidden_BSH, batch) if predictions else (None, None)
        return Observation(batch=batch, layers=tuple(found.routing), predicted_T=best, loss_T=loss)

    def _predictions(self, hidden_BSH: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """In parts: the logits of a whole batch are often larger than the model."""
        size = self._runner.model.settings.config.vocab_size
        next_T = torch.from_numpy(batch.next_BS).flatten().to(hidden_BSH.device)

        def logits(x: Tensor) -> Tensor:
            return self._runner.logits(x).float()

        found, best = in_parts(logits, hidden_BSH.flatten(0, 1), next_T, size, size)
        return best, -found

    @torch.no_grad()
    def expert(self, layer: int, x_TH: Tensor, expert: int) -> ExpertPass:
        """See `MoERunner.expert`."""
        family = self._runner.model.settings.family
        return family.expert(self._runner.block(layer).experts, expert, x_TH)

    def ranking(self, layer: int, scores_TE: Tensor) -> Tensor:
        """See `MoERunner.ranking`."""
        return self._runner.ranking(layer, scores_TE)

    @contextmanager
    def forced(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Iterator[None]:
        """See `MoERunner.forced`; a choice that is not kept has weight 0."""
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        with self._runner.forced(layer, ids_TK, weights_TK):
            yield

    def combine_weights(self, scores_TK: Tensor) -> Tensor:
        """See `MoERunner.combine_weights`."""
        return combined(self._runner.model.settings.rule, scores_TK)

    @contextmanager
    def without(self, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """See `MoERunner.without`."""
        check_experts(experts, self.sizes)
        with self._runner.without(experts):
            yield


def open_foreign_model(path: Path, step: int | None, label: str | None) -> ForeignMoEModel:
    """Open a checkpoint of one of the families.

    Raises:
        UsageError: see `open_foreign`.
    """
    return ForeignMoEModel(open_foreign(path), step, label)
