"""FP8: the format and the scaling recipe of GEMM operands, and which layers stay in bf16.

Names and meanings are those of Megatron-LM and Transformer Engine. Quantized are both operands of
every GEMM of attention, dense feed-forward layers and experts, forward and backward. Embedding,
logits, router, norms and the attention's own products never are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_moe.config.fields import AtLeastOne, NonNegative, OmittedAtDefault

Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
AmaxAlgorithm = Literal["most_recent", "max"]

ALIGNMENT: dict[Fp8Recipe, int] = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What the rows of one GEMM are padded to a multiple of, by recipe: the 16 bytes that an FP8 GEMM
of cuBLASLt reads at once, or the elements that share a scale."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """GEMMs in FP8."""

    fp8_format: Annotated[Fp8Format | None, OmittedAtDefault] = None
    """Number format of FP8 GEMMs: `e4m3` for all operands, or `hybrid`, e5m2 for the gradients of
    outputs and e4m3 for the others. `None`: no FP8."""
    fp8_recipe: Annotated[Fp8Recipe, OmittedAtDefault] = "tensorwise"
    """What shares a scale, and when it is computed. `tensorwise`: a tensor, from its own largest
    value. `delayed`: a tensor, from its largest values in earlier steps (Megatron-LM's default).
    `blockwise`: 1 x 128 elements of activations and gradients, 128 x 128 of weights. `mxfp8`: 32
    elements, with a power of two (OCP MX)."""
    fp8_emulate: Annotated[bool, OmittedAtDefault] = False
    """Round the operands of GEMMs to FP8 and back instead of multiplying in FP8, on any device:
    what a recipe does to a model, without the hardware and without its speed."""
    fp8_margin: Annotated[int, NonNegative, OmittedAtDefault] = 0
    """With `delayed`: scales are divided by 2^margin, which leaves room for larger values."""
    fp8_amax_history_len: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
    """With `delayed`: earlier steps whose largest values are kept."""
    fp8_amax_compute_algo: Annotated[AmaxAlgorithm, OmittedAtDefault] = "most_recent"
    """With `delayed`: whether the scale follows the largest value of the last step (`most_recent`)
    or of all that are kept (`max`)."""
    first_last_layers_bf16: Annotated[bool, OmittedAtDefault] = False
    """Keep the GEMMs of the first and of the last layers in the precision of the run."""
    num_layers_at_start_in_bf16: Annotated[int, NonNegative, OmittedAtDefault] = 1
    """Layers at the start that `--first-last-layers-bf16` keeps; at most those of a pipeline
    stage."""
    num_layers_at_end_in_bf16: Annotated[int, NonNegative, OmittedAtDefault] = 1
    """The same at the end."""

    def in_fp8(self, layer: int, num_layers: int) -> bool:
        """Whether the GEMMs of a layer are in FP8.

        Args:
            layer: 0-based, in the whole model.
            num_layers: L.
        """
        if self.fp8_format is None:
            return False
        if not self.first_last_layers_bf16:
            return True
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return start <= layer < num_layers - end
