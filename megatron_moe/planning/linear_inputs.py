"""What linear layers keep for their backward pass: their input, or Transformer Engine's FP8 copies.

Read from Transformer Engine 2.11 (`pytorch/module/linear.py`, `grouped_linear.py`): in FP8 a layer
keeps its input quantised, a byte an element, in the one direction that the gradient of its weight
needs; and for as long as the micro-batches of a step run, its weight in FP8 twice, by row for the
forward and by column for the backward pass. GPUs whose FP8 GEMMs take either direction (Blackwell,
with one scale a tensor) need no second copy of a weight; it is counted there too.

Letters as in `tensor_sizes.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.config.precision import ALIGNMENT, Fp8Recipe
from megatron_moe.model.logical import OF_GEMMS
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.memory import local_tensors


@dataclass(frozen=True)
class LinearInputs:
    """What the linear layers and experts of one layer of the model keep.

    Args:
        engine: whether they are Transformer Engine's, whose experts keep the product of the gate;
            ours compute it again.
        recipe: of FP8; `None` keeps tensors of the run's type.
    """

    engine: bool = False
    recipe: Fp8Recipe | None = None

    SCALES: ClassVar[dict[Fp8Recipe, tuple[int, int]]] = {"blockwise": (4, 128), "mxfp8": (1, 32)}
    """Bytes of a scale, and the elements that share it; other recipes have one a tensor."""

    @classmethod
    def of(cls, config: RunConfig, layer: int) -> LinearInputs:
        """Of a layer, counted from 0. Emulated FP8 is counted as the run's type."""
        precision = config.precision
        real = precision.fp8_format is not None and not precision.fp8_emulate
        fp8 = real and precision.in_fp8(layer, config.model.num_layers)
        engine = real or config.parallel.transformer_impl == "transformer_engine"
        return cls(engine, precision.fp8_recipe if fp8 else None)

    def bytes_of(self, elements: int, width: int) -> int:
        """Bytes of an input that is kept.

        Args:
            elements: in it.
            width: bytes b of an element in the run's type.
        """
        if self.recipe is None:
            return width * elements
        scale, block = self.SCALES.get(self.recipe, (0, 1))
        return elements + scale * -(-elements // block)

    def formula(self, elements: str) -> str:
        """As `bytes_of`, in letters."""
        if self.recipe is None:
            return f"{elements} b"
        scale, block = self.SCALES.get(self.recipe, (0, 1))
        return f"{elements} (1 + {scale}/{block})" if scale else elements

    def rows(self, rows: int) -> int:
        """Rows of an expert as its GEMMs take them: padded in FP8."""
        multiple = 1 if self.recipe is None else ALIGNMENT[self.recipe]
        return -(-rows // multiple) * multiple


def weight_copies(config: RunConfig, layout: Layout, vocab_size: int) -> tuple[int, ...]:
    """Bytes of the FP8 copies of weights on a rank of every pipeline stage."""
    layers = range(config.model.num_layers)
    in_fp8 = tuple(LinearInputs.of(config, layer).recipe is not None for layer in layers)
    if not any(in_fp8):
        return (0,) * layout.pp
    degrees = (layout.tp, layout.pp, layout.ep, layout.etp)
    elements = _elements(config.model, config.moe, vocab_size, degrees, layout.chunk_layers, in_fp8)
    # Blocks of weights have 128 x 128 elements with `blockwise`, which is nothing.
    scales = 16 if config.precision.fp8_recipe == "mxfp8" else 0
    return tuple(2 * n + (n // scales if scales else 0) for n in elements)


# A search asks for the same degrees with every micro-batch size and recomputation.
@functools.lru_cache(maxsize=4096)
def _elements(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    degrees: tuple[int, ...],
    chunk_layers: tuple[int, ...],
    in_fp8: tuple[bool, ...],
) -> tuple[int, ...]:
    """Elements of weights that FP8 GEMMs multiply by, of each stage."""
    found = [0] * degrees[1]
    for tensor in local_tensors(model, moe, vocab_size, degrees, chunk_layers):
        if tensor.kind in OF_GEMMS and in_fp8[int(tensor.name.split(".")[1])]:
            for stage in tensor.stages:
                found[stage] += tensor.copies * math.prod(tensor.local)
    return tuple(found)
