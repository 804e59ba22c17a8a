"""Thin command lines over the packages, installed as `megatron_moe_tools`."""
