"""Where it runs: a GPU, or a CPU on which Megatron-Core's CUDA habits are patched away.

Importing this package changes nothing; `activate` does.
"""

from megatron_moe.platform.activation import Platform, activate, deactivate
from megatron_moe.platform.rng import rng_states, set_rng_states

__all__ = ["Platform", "activate", "deactivate", "rng_states", "set_rng_states"]
