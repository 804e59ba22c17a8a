"""Where a run executes: on a GPU, or on a CPU with patches for Megatron-Core's use of CUDA.

Importing this package changes nothing; `activate` does.
"""

from megatron_moe.platform.activation import Platform, activate, deactivate
from megatron_moe.platform.rng import rng_states, set_rng_states

__all__ = ["Platform", "activate", "deactivate", "rng_states", "set_rng_states"]
