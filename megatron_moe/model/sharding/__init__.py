"""Logical tensors and the blocks of them that ranks hold, whatever the layout.

The logical model (`megatron_moe/model/logical.py`) has whole, unfused tensors. A rank holds local
parameters and optimizer state. Everything that must not depend on the layout goes through this
package: initial values, checkpoints, parity with the reference model, Adafactor, freezing.

Reading order:

    blocks.py            rectangular blocks of a tensor, and copies between blocks of different cuts
    shards.py            the table: of which blocks each local parameter consists
    optimizer_state.py   the state that Megatron-Core's optimizers hold for each parameter
    parts.py             parameters and state of this rank as blocks: what to load, what to save

Imports point up this list. Only `blocks.py` is free of Megatron-Core, so that checkpoints can be
read without it.
"""
