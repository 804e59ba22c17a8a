"""Activity of the neurons of a dense model, on the tokens that go through all experts of another.

The model runs in its class of `transformers`. It must read ids as the MoE model does, which the
sizes of the vocabularies alone can rule out.

Shapes: L layers, F width, H hidden, N tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.collectors.expert_passes import ACTIVE, ChosenRows
from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.foreign_config import transformers
from megatron_moe.analysis.foreign_routing import check_loaded, load_class
from megatron_moe.analysis.sample import Sample


@dataclass(frozen=True, kw_only=True)
class DenseActivity:
    """Sums over tokens.

    Args:
        active_LF: tokens for which a neuron is active.
        inner_LF: sums of the absolute input of the down projection, fp64.
        tokens: their number.
    """

    active_LF: npt.NDArray[np.int64]
    inner_LF: npt.NDArray[np.float64]
    tokens: int


@torch.no_grad()
def dense_activity(
    dense: DenseModel, sample: Sample, seed: int, device: str = "cpu"
) -> DenseActivity | None:
    """Activity on the sampled tokens; `None` if the model's vocabulary lacks some of the ids.

    Args:
        dense: the opened model.
        sample: the tokens.
        seed: of the draws of tokens.
        device: PyTorch device.

    Raises:
        UsageError: `transformers` is not installed, or the files are not those of the class.
    """
    package = transformers()
    made = package.AutoModelForCausalLM
    module, report = load_class(package, made, dense.path, dtype="auto")
    check_loaded(report, dense.path, dense.label)
    module = module.to(device)
    if sample.vocabulary[-1] >= module.config.vocab_size:
        return None
    shape = (len(dense.layers), dense.width)
    active_LF, inner_LF, tokens = np.zeros(shape, np.int64), np.zeros(shape), 0
    rows = ChosenRows(sample, seed)
    for batch in sample.batches():
        for row, chosen in rows.of(batch):
            places_N = torch.from_numpy(chosen.positions_N[chosen.sampled_N]).to(device)
            tokens_1S = torch.from_numpy(batch.tokens_BS[row : row + 1]).to(device)
            inputs = _inputs(module, tokens_1S)
            tokens += len(places_N)
            for layer, x_SH in inputs.items():
                mlp, x_NH = module.model.layers[layer].mlp, x_SH[places_N].float()
                activation_NF = mlp.act_fn(_projected(mlp.gate_proj, x_NH))
                inner_NF = activation_NF * _projected(mlp.up_proj, x_NH)
                active_LF[layer] += (activation_NF.abs() > ACTIVE).sum(0).cpu().numpy()
                inner_LF[layer] += inner_NF.abs().double().sum(0).cpu().numpy()
    return DenseActivity(active_LF=active_LF, inner_LF=inner_LF, tokens=tokens)


def _inputs(module: Any, tokens_1S: Tensor) -> dict[int, Tensor]:
    """Input of the feed-forward network of each layer, [S, H]."""
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer, block in enumerate(module.model.layers):
            handle = block.mlp.register_forward_pre_hook(
                lambda _, given, layer=layer: found.__setitem__(layer, given[0][0])
            )
            hooks.callback(handle.remove)
        module.model(tokens_1S, use_cache=False)
    return found


def _projected(linear: Any, x_NH: Tensor) -> Tensor:
    out: Tensor = x_NH @ linear.weight.float().T
    return out if linear.bias is None else out + linear.bias.float()
