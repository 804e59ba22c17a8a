"""OpenMoE on one device in plain PyTorch: the place to start reading.

The model is written to be read beside the paper (Xue et al., OpenMoE, arXiv 2402.01739) and
`docs/model.md`. It contains no parallelism, no fused kernels and nothing of Megatron-Core, so every
parallel layout is tested against it. Generation, evaluation and analysis run on it.

Reading order:

1. `model.py`: the network from token ids to the loss: embedding, decoder blocks, logits, losses.
2. `attention.py`: causal attention with rotary positions; `norm.py`: the norm.
3. `ffn.py`: feed-forward layers: dense, shared expert, and the MoE layer with its experts.
4. `routing.py`: what the router decides: top-k, capacity, which choices are dropped, router losses.
5. `cache.py`: the key-value cache of generation; training and evaluation do not use it.

Tensor names end in their shape: B batch rows, S sequence, T = B S tokens row by row, H hidden,
N heads, D head width, F feed-forward width, V vocabulary, E experts, K choices per token.
"""

from megatron_moe.model.reference.model import ReferenceOpenMoE, ReferenceOutput
from megatron_moe.model.reference.routing import Routing

__all__ = ["ReferenceOpenMoE", "ReferenceOutput", "Routing"]
