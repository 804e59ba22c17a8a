"""Corpus to tokens to samples to batches.

Text -> `tokenizer` -> `indexed_writer` (PREFIX.bin, PREFIX.idx) -> `indexed_check`, `indexed_scan`
(refuse what is broken) -> `causal` (documents packed into samples) -> `blend`, `datasets` (sources
and splits) -> `pipeline`, `loader` (micro-batches of one rank) -> `distribute` (the same on every
tensor-parallel rank).

Tokenizing needs no torch, so nothing is imported here.
"""
