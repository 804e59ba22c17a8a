"""Corpus to tokens to samples to batches.

Text -> `tokenizer` -> `indexed_writer` (PREFIX.bin, PREFIX.idx) -> `indexed_check`, `indexed_scan` (refuse
what is broken) -> `causal` (documents packed into samples) -> `blend` (sources and splits) -> `pipeline`
(micro-batches of one rank, read by `loader`) -> `distribute` (the same micro-batches on every tensor-parallel rank).

Tokenizing needs no torch, so nothing is imported here.
"""
