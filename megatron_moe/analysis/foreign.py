"""Routers and experts of other programs' mixtures, one tensor at a time, whatever the family.

Nothing is loaded to look at weights: a model larger than the memory is read layer by layer. Files
are local and only read; code that lies beside them is never run.

Shapes: E experts, F width of an expert, H hidden. Matrices are [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_moe.analysis.foreign_config import CONFIG, Settings, read_settings
from megatron_moe.convert.hf_files import open_files
from megatron_moe.convert.lazy import LazyTensor
from megatron_moe.errors import Corrupt


@dataclass(frozen=True)
class ExpertWeights:
    """`down(act(gate x) * up x)`: gate and up [F, H], down [H, F]."""

    gate: LazyTensor
    up: LazyTensor
    down: LazyTensor


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer with experts.

    Args:
        layer: its index in the network, from 0.
        router: [E, H].
        bias: [E], added to the scores for the choice alone; only with `Rule.biased`.
        experts: E of them.
        shared: the expert that every token passes; several are kept as one wide one.
        shared_gate: [1, H]: the logit of the sigmoid that weighs the shared expert's output.
    """

    layer: int
    router: LazyTensor
    bias: LazyTensor | None
    experts: tuple[ExpertWeights, ...]
    shared: ExpertWeights | None
    shared_gate: LazyTensor | None


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A checkpoint directory, opened.

    Args:
        path: the directory.
        settings: family, sizes, routing rule.
        layers: the layers with experts, in order.
        tensors: everything in the files, by its name there.
    """

    path: Path
    settings: Settings
    layers: tuple[LayerWeights, ...]
    tensors: Mapping[str, LazyTensor]


def open_foreign(path: str | Path) -> ForeignModel:
    """A checkpoint directory of one of `FAMILIES`: every name and shape checked, nothing read.

    Raises:
        UsageError: `transformers` is not installed, the family is unknown, a file is missing or
            damaged, or tensors are not those that the configuration means.
    """
    path = Path(path)
    settings = read_settings(path)
    tensors = open_files(path)
    reader = _Reader(path, settings, tensors)
    return ForeignModel(
        path=path,
        settings=settings,
        layers=tuple(reader.layer(index) for index in settings.moe_layers),
        tensors=tensors,
    )


@dataclass(frozen=True)
class _Reader:
    path: Path
    settings: Settings
    tensors: dict[str, LazyTensor]

    @property
    def hidden(self) -> int:
        return int(self.settings.config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        family, experts = self.settings.family, self.settings.num_experts
        width = getattr(self.settings.config, family.width)
        prefix = f"model.layers.{index}."
        # `transformers` calls the module `mlp` in all families and may save it under that name.
        old = f"{prefix}{family.block}.gate.weight" in self.tensors
        block = f"{prefix}{family.block if old else 'mlp'}."
        gate, shared = f"{block}gate.", f"{block}{family.shared}"
        bias = (
            self._get(f"{gate}e_score_correction_bias", experts)
            if self.settings.rule.biased
            else None
        )
        return LayerWeights(
            layer=index,
            router=self._get(f"{gate}weight", experts, self.hidden),
            bias=bias,
            experts=self._experts(f"{block}experts", experts, width),
            shared=self._shared(shared) if family.shared else None,
            shared_gate=(
                self._get(f"{shared}_gate.weight", 1, self.hidden) if family.shared_gate else None
            ),
        )

    def _experts(self, prefix: str, count: int, width: int) -> tuple[ExpertWeights, ...]:
        """From a matrix each, or from the stacks [E, 2F, H] and [E, H, F] of newer files."""
        hidden = self.hidden
        if f"{prefix}.gate_up_proj" in self.tensors:
            both = self._get(f"{prefix}.gate_up_proj", count, 2 * width, hidden)
            down = self._get(f"{prefix}.down_proj", count, hidden, width)
            cuts = ((both, 0, width), (both, width, width), (down, 0, hidden))
            return tuple(
                ExpertWeights(*(_part(s, e, *rows) for s, *rows in cuts)) for e in range(count)
            )
        return tuple(
            self._expert(f"{prefix}.{e}", self.settings.family.matrices, width)
            for e in range(count)
        )

    def _shared(self, prefix: str) -> ExpertWeights:
        names = ("gate_proj", "up_proj", "down_proj")
        return self._expert(prefix, names, self.settings.family.shared_width(self.settings.config))

    def _expert(self, prefix: str, names: tuple[str, str, str], width: int) -> ExpertWeights:
        gate, up, down = (f"{prefix}.{name}.weight" for name in names)
        hidden = self.hidden
        return ExpertWeights(
            self._get(gate, width, hidden),
            self._get(up, width, hidden),
            self._get(down, hidden, width),
        )

    def _get(self, name: str, *shape: int) -> LazyTensor:
        if name not in self.tensors:
            raise Corrupt(str(self.path), f"without {name}", "all tensors of the model")
        found = self.tensors[name]
        if found.shape != shape:
            what = f"{name} in {self.path}"
            raise Corrupt(what, f"shape {list(found.shape)}", f"{list(shape)} by its {CONFIG}")
        return found


def _part(stack: LazyTensor, expert: int, first: int, rows: int) -> LazyTensor:
    """Rows [first, first + rows) of one matrix of a stack [E, out, in]."""

    def read(start: int, stop: int) -> Tensor:
        return stack.rows(expert, expert + 1)[0][first + start : first + stop]

    return LazyTensor((rows, stack.shape[2]), stack.dtype, read)
