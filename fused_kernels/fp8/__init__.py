"""FP8 GEMMs by quantising and dequantising their operands, on any device.

`rules` has the quantisation of each recipe, bit for bit Transformer Engine's; `gemm` a GEMM whose
operands went through it, forward and backward. What is emulated is the rounding of the operands:
products are accumulated in fp32, where tensor cores may accumulate with fewer bits.
"""
