"""From text files to the micro-batches of a training step.

    preprocess/   text files -> token ids (tools/preprocess_data.py)
    indexed/      the `.bin`, `.idx` and manifest files, and what checks, merges and inspects them
    objectives/   what a training sample is: prefix LM, UL2, conversations

At the top, what training reads. Reading order of a sample, from its index to the model: `loader`
(which indices a rank reads; samples -> micro-batch), `causal` (index -> tokens, labels, loss mask),
`batch` (the micro-batch on every tensor-parallel rank). What is set up before: `named_mixture` and
`blend` (which sources, in which proportions), `datasets` (opens and checks sources, builds the
dataset of a split), `pipeline` (the loaders of one rank), `composition` (what the log reports).

Preprocessing needs no torch, so this module imports nothing.
"""
