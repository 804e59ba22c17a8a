"""From a layout to process groups, pipeline schedules and finished gradients.

The only place that touches `megatron.core.parallel_state`.
"""
