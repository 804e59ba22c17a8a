"""Megatron-LM's GPT checkpoints in the format `torch_dist`: names, fused matrices, expert layouts.

    decoder.layers.self_attention.linear_qkv.weight    [L, ..]: all layers in one tensor, or
    decoder.layers.3.self_attention.linear_qkv.weight  one for each layer (MoE layers in a pattern)

`linear_qkv` [g (n / g + 2) d, H] holds for each of g groups its n / g query heads, then its key and
value head. `linear_fc1` [2 F, H] is [gate; up]. Experts are [E, out, in], or one tensor each.
Source: `sharded_state_dict` of the modules of Megatron-Core 0.16.

Shapes: L layers, H hidden, n heads, g query groups, d head width, F width, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.config import RunConfig
from megatron_moe.convert.hf_files import check_no_extra
from megatron_moe.convert.megatron_config import check_same_network, megatron_config
from megatron_moe.convert.model import LazyTensor, LogicalModel
from megatron_moe.convert.pickled import attributes
from megatron_moe.convert.torch_dist import COMMON, METADATA, StoredTensor, open_tensors, read_saved
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.logical import logical_parameters

TRACKER, FORMAT = "latest_checkpointed_iteration.txt", "metadata.json"
CONVERT = (
    "load it in Megatron-LM with the flags of its run and --ckpt-convert-format torch_dist "
    "--ckpt-convert-save DIR, and convert DIR"
)
_WHOLE = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "output.weight": "output_layer.weight",
}
_LAYER = {
    # With Transformer Engine a norm belongs to the layer after it; other layouts use both names.
    "attention_norm.weight": (
        "self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight",
    ),
    "ffn_norm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "attention.query_norm.weight": ("self_attention.q_layernorm.weight",),
    "attention.key_norm.weight": ("self_attention.k_layernorm.weight",),
    "attention.output.weight": ("self_attention.linear_proj.weight",),
    "moe.router.weight": ("mlp.router.weight",),
    "ffn.down.weight": ("mlp.linear_fc2.weight",),
    "shared.down.weight": ("mlp.shared_experts.linear_fc2.weight",),
}
_GATED = {"ffn": "mlp.linear_fc1.weight", "shared": "mlp.shared_experts.linear_fc1.weight"}
_HALVES = {"gate": (0, "_w"), "up": (1, "_v")}
_NO_MODEL = re.compile(r"^(optimizer|chained_)|_extra_state|rng_state|rerun_state")


def read_megatron(
    directory: Path, step: int | None = None, config: RunConfig | None = None
) -> LogicalModel:
    """Read a checkpoint.

    Args:
        directory: the checkpoints of a run, or the folder of one iteration.
        step: iteration, by default the tracker's.
        config: the model, if the checkpoint records no arguments, or for another way of training;
            recorded arguments must describe the same network.

    Raises:
        UsageError: another format, a damaged file, or a model that this project does not have.
    """
    folder = checkpoint_folder(directory, step)
    common = _common(folder)
    if config is None:
        config = megatron_config(_arguments(common, folder), str(folder / COMMON))
    elif common.get("args") is not None:
        check_same_network(_arguments(common, folder), str(folder / COMMON), config)
    stored = model_tensors(folder)
    reader = _Reader(str(folder), config, stored)
    embedding = reader.whole(_WHOLE["embedding.weight"])
    vocab_size = embedding.shape[0]
    tensors = {
        name: reader.tensor(name)
        for name in logical_parameters(config.model, config.moe, vocab_size)
    }
    check_no_extra(folder, stored.keys() - reader.used)
    iteration = common.get("iteration")
    return LogicalModel(
        source=str(folder),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        step=iteration if type(iteration) is int and 0 <= iteration < 10**12 else 0,
    )


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the model by name, without those of optimizer and random states.

    Raises:
        Corrupt: the index is missing or damaged.
    """
    return {n: t for n, t in open_tensors(folder).items() if not _NO_MODEL.search(n)}


def checkpoint_folder(directory: Path, step: int | None = None) -> Path:
    """The folder of one iteration, in the format `torch_dist`.

    Raises:
        CheckpointError: there is none; what lies there instead is named.
    """
    folder = directory
    if (directory / FORMAT).exists() or (directory / METADATA).exists():
        if step is not None:
            what, expected = "--ckpt-step", "absent for the folder of one iteration"
            raise CheckpointError(what, step, expected)
    else:
        folder = directory / _iteration(directory, step)
    if not folder.is_dir():
        steps = sorted(path.name for path in directory.glob("iter_*"))
        found = f"missing beside {', '.join(steps[-3:])}" if steps else "missing"
        raise CheckpointError(str(folder), found, "the folder of an iteration", "see --ckpt-step")
    if any(folder.glob("mp_rank_*")):
        found = "the format `torch`, with mp_rank_00: pickles that only Megatron-LM can load"
        raise CheckpointError(str(folder), found, "a checkpoint in the format torch_dist", CONVERT)
    backend = read_json(folder / FORMAT).get("sharded_backend")
    if backend != "torch_dist":
        what = f"sharded_backend in {folder / FORMAT}"
        raise CheckpointError(what, backend, "'torch_dist'", CONVERT)
    return folder


def _iteration(directory: Path, step: int | None) -> str:
    """Name of the folder of an iteration, by default the one that the tracker names."""
    if step is not None:
        return f"iter_{step:07d}"
    try:
        text = (directory / TRACKER).read_text().strip()
    except FileNotFoundError:
        found = "missing" if not directory.is_dir() else f"without {TRACKER} and {FORMAT}"
        expected = "checkpoints of Megatron-LM, or the folder of one iteration"
        raise CheckpointError(str(directory), found, expected) from None
    except (OSError, ValueError) as error:
        raise Corrupt(str(directory / TRACKER), str(error), "a number of iterations") from None
    if text == "release":
        return "release"
    if not text.isdecimal() or len(text) > 12:
        raise Corrupt(str(directory / TRACKER), text[:60], "a number of iterations")
    return f"iter_{int(text):07d}"


def _common(folder: Path) -> dict[str, Any]:
    value = read_saved(folder / COMMON)
    if not isinstance(value, dict):
        raise Corrupt(str(folder / COMMON), type(value).__name__, "a dictionary")
    return value


def _arguments(common: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if "args" not in common:
        fix = "give --config, the config.json of a run with this model"
        what = f"args in {folder / COMMON}"
        raise CheckpointError(what, None, "there, as Megatron-LM's training saves them", fix)
    try:
        return attributes(common["args"], "Namespace")
    except ValueError as error:
        expected = "an argparse.Namespace"
        raise Corrupt(f"args in {folder / COMMON}", str(error), expected) from None


@dataclass(frozen=True)
class _View:
    """A stored tensor with its first dimensions fixed: one layer, one expert, or nothing."""

    stored: StoredTensor
    fixed: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[len(self.fixed) :]

    def rows(self, start: int, stop: int) -> Tensor:
        region = [*((place, place + 1) for place in self.fixed), (start, stop)]
        return self.stored.read(region).flatten(0, len(self.fixed))

    def lazy(self, first: int = 0, count: int | None = None) -> LazyTensor:
        """``count`` rows from ``first`` on, by default all."""
        shape = (self.shape[0] if count is None else count, *self.shape[1:])
        read = lambda start, stop: self.rows(first + start, first + stop)  # noqa: E731
        return LazyTensor(shape, self.stored.dtype, read)


class _Reader:
    """The logical tensors of one checkpoint; remembers which stored ones were used.

    Args:
        source: the folder, for messages.
        config: the model.
        stored: the tensors of the checkpoint.
    """

    def __init__(self, source: str, config: RunConfig, stored: Mapping[str, StoredTensor]) -> None:
        self.source = source
        self.model = config.model
        self.moe = config.moe
        self.stored = stored
        self.used: set[str] = set()

    def tensor(self, name: str) -> LazyTensor:
        """A tensor by its logical name."""
        if name in _WHOLE:
            return self.whole(_WHOLE[name])
        _, number, rest = name.split(".", 2)
        layer = int(number)
        if rest in _LAYER:
            return self.view(layer, *_LAYER[rest]).lazy()
        part, kind, *_ = rest.split(".")
        if part == "attention":
            return self.heads(layer, kind)
        if part == "moe":
            return self.experts(layer, rest.rsplit(".", 1)[1])
        return self.half(layer, _GATED[part], kind)

    def whole(self, name: str) -> LazyTensor:
        """A tensor that belongs to no layer."""
        return _View(self.take(name)).lazy()

    def take(self, *names: str) -> StoredTensor:
        """The stored tensor with the first of these names that exists.

        Raises:
            Corrupt: there is none.
        """
        for name in names:
            if name in self.stored:
                self.used.add(name)
                return self.stored[name]
        expected = "a checkpoint with all tensors of the model in its args"
        raise Corrupt(self.source, f"one without {names[-1]}", expected)

    def view(self, layer: int, *names: str) -> _View:
        """A tensor of a layer, of its own or part of one for all layers."""
        own = [f"decoder.layers.{layer}.{name}" for name in names]
        stored = self.take(*own, *(f"decoder.layers.{name}" for name in names))
        if stored.name in own:
            return _View(stored)
        if stored.shape[0] != self.model.num_layers:
            expected = f"{self.model.num_layers} layers"
            raise Corrupt(f"{stored.name} in {self.source}", f"{stored.shape[0]} layers", expected)
        return _View(stored, (layer,))

    def has(self, layer: int, name: str) -> bool:
        """Whether there is such a tensor of a layer."""
        return bool(
            {f"decoder.layers.{layer}.{name}", f"decoder.layers.{name}"} & self.stored.keys()
        )

    def heads(self, layer: int, kind: str) -> LazyTensor:
        """Queries, keys or values of all heads, from the fused matrix."""
        fused = self.view(layer, "self_attention.linear_qkv.weight")
        heads, width = self.model.num_attention_heads, self.model.kv_channels
        groups = self.model.key_value_heads
        shared = heads // groups
        if fused.shape[0] != (heads + 2 * groups) * width:
            expected = f"{(heads + 2 * groups) * width} rows"
            what = f"{fused.stored.name} in {self.source}"
            raise Corrupt(what, f"{fused.shape[0]} rows", expected)
        block = (shared + 2) * width
        first, count = {
            "query": (0, shared * width),
            "key": (shared * width, width),
            "value": ((shared + 1) * width, width),
        }[kind]

        def rows(start: int, stop: int) -> Tensor:
            parts = []
            for group in range(start // count, -(-stop // count)):
                low, high = max(start, group * count), min(stop, (group + 1) * count)
                base = group * block + first - group * count
                parts.append(fused.rows(base + low, base + high))
            return torch.cat(parts)

        return LazyTensor((groups * count, fused.shape[1]), fused.stored.dtype, rows)

    def half(self, layer: int, name: str, kind: str) -> LazyTensor:
        """The gate or the up matrix [F, H] of a fused one [gate; up]."""
        place, ending = _HALVES[kind]
        if self.has(layer, name + ending):
            return self.view(layer, name + ending).lazy()
        fused = self.view(layer, name)
        width = fused.shape[0] // 2
        return fused.lazy(place * width, width)

    def experts(self, layer: int, kind: str) -> LazyTensor:
        """[E, in, out], from matrices [out, in]."""
        each = list(self._each_expert(layer, kind))
        out, width = each[0].shape

        def rows(start: int, stop: int) -> Tensor:
            return torch.stack([tensor.whole().t() for tensor in each[start:stop]])

        return LazyTensor((len(each), width, out), each[0].dtype, rows)

    def _each_expert(self, layer: int, kind: str) -> Iterator[LazyTensor]:
        place, ending = _HALVES.get(kind, (0, ""))
        matrix = "linear_fc2.weight" if kind == "down" else "linear_fc1.weight"
        for expert in range(self.moe.num_experts):
            own = f"mlp.experts.experts.{expert}.{matrix}"
            if self.has(layer, own + ending):
                yield self.view(layer, own + ending).lazy()
                continue
            stack = self.view(layer, f"mlp.experts.experts.{matrix}")
            if stack.shape[0] != self.moe.num_experts:
                expected = f"{self.moe.num_experts} experts"
                what = f"{stack.stored.name} in {self.source}"
                raise Corrupt(what, f"{stack.shape[0]} experts", expected)
            one = _View(stack.stored, (*stack.fixed, expert))
            if kind == "down":
                yield one.lazy()
            else:
                width = one.shape[0] // 2
                yield one.lazy(place * width, width)
