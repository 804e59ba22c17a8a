"""Tests of `megatron_moe.data`."""
