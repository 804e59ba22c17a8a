"""Objectives: how tokens become a training sample, selected by `--objective`.

Reading order: `select` (from the flag to a dataset class), `prefix_lm`, then UL2: `denoiser` (the
mixture), `spans` (hides spans of a text), `windows` (cuts the text), `ul2` (the samples); then
conversations: `chat` (template), `chat_source` (tokens), `sft` (rows). All randomness comes from
`rng`, as a function of the seed and the number of the sample.
"""
