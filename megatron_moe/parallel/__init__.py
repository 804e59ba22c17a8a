"""From a layout to process groups, collectives, pipeline schedules and reduced gradients.

The only package that uses `megatron.core.parallel_state`.
"""
