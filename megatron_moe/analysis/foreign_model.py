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
from megatron_moe.analysis.model import ExpertWeights, LayerWeights, MoEModel, MoERunner, Sizes
from megatron_moe.analysis.observation import Observation, TokenBatch


class ForeignMoEModel(MoEModel):
    """See the module.

    Args:
        found: the opened directory.
        label: name in reports.
    """

    def __init__(self, found: ForeignModel, label: str | None) -> None:
        settings = found.settings
        config, family = settings.config, settings.family
        self._found = found
        self._layers = {weights.layer: weights for weights in found.layers}
        self.path, self.step, self.family = found.path, None, family.label
        self.label = label or found.path.resolve().name
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
        return ForeignMoERunner(load_foreign(self._found, device=device, dtype=dtype))


class ForeignMoERunner(MoERunner):
    """The family's class of `transformers`, with hooks.

    Args:
        runner: the loaded model.
    """

    def __init__(self, runner: ForeignRunner) -> None:
        self._runner = runner

    def run(
        self, batch: TokenBatch, *, inputs: Collection[int] = (), predictions: bool = False
    ) -> Observation:
        """See `MoERunner.run`."""
        tokens_BS = torch.from_numpy(batch.tokens_BS)
        found = self._runner.run(tokens_BS, inputs=bool(inputs), logits=predictions)
        best = loss = None
        if found.logits_BSV is not None:
            logits_TV = found.logits_BSV.flatten(0, 1)
            next_T = torch.from_numpy(batch.next_BS).flatten().to(logits_TV.device)
            best = logits_TV.argmax(-1)
            loss = torch.nn.functional.cross_entropy(logits_TV.float(), next_T, reduction="none")
        return Observation(batch=batch, layers=tuple(found.routing), predicted_T=best, loss_T=loss)

    def expert_outputs(self, layer: int, x_TH: Tensor, experts: Sequence[int]) -> Tensor:
        """See `MoERunner.expert_outputs`."""
        raise NotImplementedError

    @contextmanager
    def forced(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> Iterator[None]:
        """See `MoERunner.forced`."""
        raise NotImplementedError
        yield

    @contextmanager
    def without(self, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """See `MoERunner.without`."""
        raise NotImplementedError
        yield


def open_foreign_model(path: Path, label: str | None) -> ForeignMoEModel:
    """Open a checkpoint of one of `FAMILIES`.

    Raises:
        UsageError: see `open_foreign`.
    """
    return ForeignMoEModel(open_foreign(path), label)
