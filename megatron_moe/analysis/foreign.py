"""Routers and experts of other programs' mixtures, one tensor at a time, whatever the family.

Nothing is loaded to look at weights: a model larger than the memory is read layer by layer. Files
are local and only read; code that lies beside them is never run.

Shapes: E experts, F width of an expert, H hidden. Matrices are [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_moe.analysis.families import FAMILIES, Family, Rule
from megatron_moe.checkpoint.errors import Corrupt
from megatron_moe.checkpoint.files import read_json
from megatron_moe.convert.hf_files import open_files
from megatron_moe.convert.lazy import LazyTensor
from megatron_moe.errors import UsageError

CONFIG = "config.json"


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
        model_type: key of `FAMILIES`.
        family: the entry.
        config: the family's own configuration class, filled.
        rule: how its routers choose.
        layers: the layers with experts, in order.
        tensors: everything in the files, by its name there.
    """

    path: Path
    model_type: str
    family: Family
    config: Any
    rule: Rule
    layers: tuple[LayerWeights, ...]
    tensors: Mapping[str, LazyTensor]

    @property
    def num_experts(self) -> int:
        """E."""
        return int(getattr(self.config, self.family.experts))


def transformers() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("transformers")
    except ImportError:
        expected = "installed, for the models of other programs"
        fix = "pip install 'megatron-moe[hf]'"
        raise UsageError("package transformers", "missing", expected, fix) from None


def is_foreign(path: Path) -> bool:
    """Whether this is a directory of one checkpoint, with a `model_type`, rather than of a run."""
    return (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG)


def open_foreign(path: str | Path) -> ForeignModel:
    """A checkpoint directory of one of `FAMILIES`: every name and shape checked, nothing read.

    Raises:
        UsageError: `transformers` is not installed, the family is unknown, a file is missing or
            damaged, or tensors are not those that the configuration means.
    """
    path = Path(path)
    values = read_json(path / CONFIG)
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        fix = "OpenMoE and Llama are read by tools/convert_checkpoint.py --from hf"
        expected = f"one of {', '.join(FAMILIES)}"
        raise UsageError(f"model_type in {path / CONFIG}", kind, expected, fix)
    if values.get("quantization_config"):
        what = f"quantization_config in {path / CONFIG}"
        raise UsageError(what, "there", "absent: weights in fp32, bf16 or fp16")
    config = _configuration(family, path, values)
    rule, tensors = family.rule(config), open_files(path)
    reader = _Reader(path, family, config, tensors)
    return ForeignModel(
        path=path,
        model_type=str(kind),
        family=family,
        config=config,
        rule=rule,
        layers=tuple(reader.layer(i, rule.biased) for i in family.moe_layers(config)),
        tensors=tensors,
    )


def _configuration(family: Family, path: Path, values: dict[str, Any]) -> Any:
    package, source = transformers(), str(path / CONFIG)
    try:
        return family.configuration(package, path, values, source)
    except UsageError:
        raise
    except Exception as error:  # whatever the class makes of wrong values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Corrupt(source, reason, f"settings of a {family.label}") from None


@dataclass(frozen=True)
class _Reader:
    path: Path
    family: Family
    config: Any
    tensors: dict[str, LazyTensor]

    def layer(self, index: int, biased: bool) -> LayerWeights:
        family, hidden = self.family, self.config.hidden_size
        experts, width = getattr(self.config, family.experts), getattr(self.config, family.width)
        prefix = f"model.layers.{index}."
        # `transformers` calls the module `mlp` in all families and may save it under that name.
        old = f"{prefix}{family.block}.gate.weight" in self.tensors
        block = f"{prefix}{family.block if old else 'mlp'}."
        gate, shared = f"{block}gate.", f"{block}{family.shared}"
        bias = self._get(f"{gate}e_score_correction_bias", experts) if biased else None
        return LayerWeights(
            layer=index,
            router=self._get(f"{gate}weight", experts, hidden),
            bias=bias,
            experts=self._experts(f"{block}experts", experts, width),
            shared=self._shared(shared) if family.shared else None,
            shared_gate=(
                self._get(f"{shared}_gate.weight", 1, hidden) if family.shared_gate else None
            ),
        )

    def _experts(self, prefix: str, count: int, width: int) -> tuple[ExpertWeights, ...]:
        """From a matrix each, or from the stacks [E, 2F, H] and [E, H, F] of newer files."""
        hidden = self.config.hidden_size
        if f"{prefix}.gate_up_proj" in self.tensors:
            both = self._get(f"{prefix}.gate_up_proj", count, 2 * width, hidden)
            down = self._get(f"{prefix}.down_proj", count, hidden, width)
            cuts = ((both, 0, width), (both, width, width), (down, 0, hidden))
            return tuple(
                ExpertWeights(*(_part(s, e, *rows) for s, *rows in cuts)) for e in range(count)
            )
        return tuple(
            self._expert(f"{prefix}.{e}", self.family.matrices, width) for e in range(count)
        )

    def _shared(self, prefix: str) -> ExpertWeights:
        names = ("gate_proj", "up_proj", "down_proj")
        return self._expert(prefix, names, self.family.shared_width(self.config))

    def _expert(self, prefix: str, names: tuple[str, str, str], width: int) -> ExpertWeights:
        gate, up, down = (f"{prefix}.{name}.weight" for name in names)
        hidden = self.config.hidden_size
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
