"""OpenMoE pretraining on Megatron-Core, with routing that can be seen and improved."""

__version__ = "0.1.0"
