"""Operands whose FP8 bytes are recorded, and the digests of Transformer Engine's own references.

The references are Python: `CurrentScalingQuantizerRef` of the wheel of Transformer Engine 2.11.0
(`transformer_engine.pytorch.custom_recipes`), and `BlockwiseQuantizerReference` of its repository
(`tests/pytorch/references`). The package does not import without its compiled module, so that the
bytes are recorded. With a stub in place of that module on the path they come again from

    python -m tests.fused_kernels.fp8.vectors REPOSITORY/tests/pytorch
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor

SCALES = (1e-6, 1.0, 3e4)


def operand() -> Tensor:
    """[768, 256] bf16: three ranges of values, heavy tails, a row and a block of zeros, and numbers
    next to the smallest.
    """
    place = torch.arange(256 * 256, dtype=torch.int64).view(256, 256)
    noise = (place * 2654435761 % (1 << 32)).double() / (1 << 31) - 1
    x = torch.cat([noise**3 * scale for scale in SCALES]).to(torch.bfloat16)
    x[5], x[128:256, 128:] = 0.0, 0.0
    x[7, :32] = torch.finfo(torch.bfloat16).tiny
    x[300, 64:128] = 448.0
    return x


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def references(repository: str) -> dict[str, str]:
    """Digests of FP8 values and inverse scales, from Transformer Engine's own code."""
    sys.path.insert(0, repository)
    from references.blockwise_quantizer_reference import BlockwiseQuantizerReference
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import (
        CurrentScalingQuantizerRef,
    )

    x, found = operand(), {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = str(dtype).removeprefix("torch.float8_")
        whole: Any = CurrentScalingQuantizerRef(dtype).quantize(x)
        found[f"tensorwise {name}"] = digest(whole.data, whole.scale)
        for rows in (1, 128):
            blocks: Any = BlockwiseQuantizerReference().quantize(
                x,
                dtype,
                return_transpose=False,
                eps=0.0,
                pow_2_scales=True,
                quant_tile_shape=(rows, 128),
            )
            # In cuBLAS's layouts: transposed, or with columns padded to a multiple of 4.
            scale = blocks.scale.t() if rows == 1 else blocks.scale[:, : x.shape[1] // 128]
            found[f"blockwise {rows} {name}"] = digest(blocks.data, scale)
    return found


RECORDED = {
    "tensorwise e4m3fn": "8ebbeb129f1c1b9f73ffaca48296dab08d544a33a2bff32a878b99b67eef5811",
    "blockwise 1 e4m3fn": "13c493f1b537a8d5f38971b107d9e7acdf0e321b9e8cda95b9c5912b7910eb37",
    "blockwise 128 e4m3fn": "615335eae7442988cafc8ca324d094d9e6ac5e0077fa281ba066401b34147780",
    "tensorwise e5m2": "8086b4a09636898ef6b529612e47924ff03458a13b3c5f85f0293978045bae21",
    "blockwise 1 e5m2": "a9c7ce323620f83f939213a4a36faf4418a6f4f0b5c8f2ce9d0c85b4e19e469d",
    "blockwise 128 e5m2": "0e4f3536771189571a244e4f09264628f7a5798dc814d493e7038527eb7ee11a",
}
"""Recipe, rows of a block and type, and what `references` returned."""

if __name__ == "__main__":
    for key, value in references(sys.argv[1]).items():
        print(f'    "{key}": "{value}",')
