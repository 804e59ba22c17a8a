"""t5x (flaxformer) checkpoints of OpenMoE: the names and orientation of its parameters.

Kernels are stored [in, out], the transpose of the logical model; experts [E, in, out] and the
embedding [V, H] are not transposed. Source: the released checkpoints, and the script that converted
them to Hugging Face ones. `t5x_arrays.py` reads and writes the arrays, `t5x_tree.py` the file
`checkpoint` beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.convert.model import LazyTensor, LogicalModel, of_tensor
from megatron_moe.convert.t5x_arrays import DTYPES, as_torch, open_array, write_array
from megatron_moe.convert.t5x_tree import FILE, leaves, read_tree, step_of, write_tree
from megatron_moe.convert.writing import Progress, new_directory, write_error
from megatron_moe.errors import CheckpointError, Corrupt, UsageError
from megatron_moe.model.logical import logical_parameters

_WHOLE = {
    "embedding.weight": ("token_embedder/embedding", False),
    "final_norm.weight": ("decoder/decoder_norm/scale", False),
    "output.weight": ("decoder/logits_dense/kernel", True),
}
_LAYER = {
    "attention_norm.weight": ("pre_self_attention_layer_norm/scale", False),
    "attention.query.weight": ("self_attention/query/kernel", True),
    "attention.key.weight": ("self_attention/key/kernel", True),
    "attention.value.weight": ("self_attention/value/kernel", True),
    "attention.output.weight": ("self_attention/out/kernel", True),
    "ffn_norm.weight": ("pre_mlp_layer_norm/scale", False),
    "ffn.gate.weight": ("mlp/wi_0/kernel", True),
    "ffn.up.weight": ("mlp/wi_1/kernel", True),
    "ffn.down.weight": ("mlp/wo/kernel", True),
    "moe.router.weight": ("mlp/router/router_weights/w/kernel", True),
    "moe.experts.gate": ("mlp/expert/wi_0/kernel", False),
    "moe.experts.up": ("mlp/expert/wi_1/kernel", False),
    "moe.experts.down": ("mlp/expert/wo/kernel", False),
    "shared_norm.weight": ("pre_extra_mlp_layer_norm/scale", False),
    "shared.gate.weight": ("extra_mlp/wi_0/kernel", True),
    "shared.up.weight": ("extra_mlp/wi_1/kernel", True),
    "shared.down.weight": ("extra_mlp/wo/kernel", True),
}


def t5x_name(name: str) -> tuple[str, bool]:
    """The path of a logical tensor below `target`, and whether it is stored transposed.

    Raises:
        KeyError: t5x has no such parameter.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    _, number, rest = name.split(".", 2)
    path, transposed = _LAYER[rest]
    return f"decoder/layers_{number}/{path}", transposed


def check_expressible(config: RunConfig) -> None:
    """Require attention and router as t5x has them: flaxformer stores neither shared key heads nor
    their norms, and one matrix for a router.

    Raises:
        UsageError: names the flag.
    """
    for flag, value in (
        ("--group-query-attention", config.model.group_query_attention),
        ("--qk-layernorm", config.model.qk_layernorm),
    ):
        if value:
            raise UsageError(flag, value, "unset for t5x, whose OpenMoE has no such attention")
    experts = config.moe.moe_layer_num_experts
    if experts is not None:
        flag, found = "--moe-layer-num-experts", " ".join(map(str, experts))
        raise UsageError(flag, found, "unset for t5x, whose MoE layers are alike")
    router = config.moe.moe_router_type
    if router != "linear":
        raise UsageError("--moe-router-type", router, "linear for t5x, whose router is one matrix")
    if config.moe.has_expert_bias:
        flag, kinds = "--moe-router-load-balancing-type", config.moe.load_balancing_types
        if config.moe.moe_router_enable_expert_bias:
            raise UsageError("--moe-router-enable-expert-bias", True, "unset for t5x")
        raise UsageError(flag, " ".join(kinds), "a loss for t5x, which has no bias of experts")


def read_t5x(directory: Path, config: RunConfig) -> LogicalModel:
    """Read a checkpoint directory.

    Args:
        directory: directory of the file `checkpoint`.
        config: configuration of the model, which t5x keeps in gin files elsewhere.

    Raises:
        UsageError: a file is missing or damaged, or the checkpoint is of another model.
    """
    check_expressible(config)
    tree = read_tree(directory)
    found = dict(leaves(tree["target"]))
    _check_one_array_per_layer(directory, found)
    embedding = _array(directory, "token_embedder/embedding", found, False)
    vocab_size = embedding.shape[0]
    tensors, used = {}, set()
    for name in logical_parameters(config.model, config.moe, vocab_size):
        path, transposed = t5x_name(name)
        used.add(path)
        tensors[name] = _array(directory, path, found, transposed)
    if extra := sorted(found.keys() - used):
        raise _another_model(directory, found, f"one with {extra[0]}")
    return LogicalModel(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        step=step_of(tree),
    )


def _array(directory: Path, path: str, found: dict[str, Any], transposed: bool) -> LazyTensor:
    """One parameter; rows of a transposed one are read as columns of the stored array."""
    if path not in found:
        raise _another_model(directory, found, f"one without {path}")
    leaf = found[path]
    if not isinstance(leaf, dict):
        values = _values(directory, path, leaf)
        return of_tensor(values.t() if transposed else values)
    return open_array(directory, path, leaf, transposed)


def _values(directory: Path, path: str, leaf: Any) -> Tensor:
    """An array in the file itself, of one or two dimensions and floating-point numbers."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.name not in DTYPES:
        found = leaf.dtype.name if isinstance(leaf, np.ndarray) else type(leaf).__name__
        expected = f"an array of one of {', '.join(DTYPES)}, or the specification of one"
        raise Corrupt(f"{path} in {directory / FILE}", found, expected)
    return as_torch(leaf)


def _check_one_array_per_layer(directory: Path, found: dict[str, Any]) -> None:
    """Reject scanned layers (`scalable_t5`), whose parameters are one array for all layers."""
    scanned = [path for path in found if path.startswith(("decoder/decoder/", "decoder/layers/"))]
    if scanned and not any(path.startswith("decoder/layers_") for path in found):
        fix = "split the arrays along their layer axis in JAX, and save them as layers_0, ..."
        expected = "an array for each layer, decoder/layers_0/..."
        what = f"parameters of {directory}"
        raise CheckpointError(what, f"scanned layers: {scanned[0]}", expected, fix)


def _another_model(directory: Path, found: dict[str, Any], what: str) -> CheckpointError:
    """The error for other parameters than those of the configuration."""
    layers = {path.split("/")[1] for path in found if path.startswith("decoder/layers_")}
    moe = {path.split("/")[1] for path in found if path.endswith("mlp/expert/wi_0/kernel")}
    has = f"it has {len(layers)} layers, {len(moe)} of them with experts"
    expected = "a checkpoint of the model that --preset or --config names"
    return CheckpointError(str(directory), what, expected, has)


def write_t5x(model: LogicalModel, directory: Path, progress: Progress) -> Path:
    """Write a new checkpoint directory, complete or not at all, without optimizer state.

    Raises:
        CheckpointError: the directory exists, or the disk is full.
    """
    try:
        with new_directory(directory, model.bytes) as temporary:
            specs = {}
            for name, tensor in model.tensors.items():
                path, transposed = t5x_name(name)
                specs[path] = write_array(temporary, path, tensor, transposed, progress)
            write_tree(temporary / FILE, specs, model.step)
    except ValueError as error:  # how TensorStore reports that it cannot write
        raise write_error(directory, model.bytes, error) from error
    return directory
