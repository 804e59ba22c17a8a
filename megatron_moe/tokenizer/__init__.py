"""Text to token ids and back.

Reading order: `base` (the interface, special ids), `simple` (bytes; plain ids), `sentencepiece` and
`huggingface` (model files), `word_cache` (faster encoding of byte-pair models), `build` (the
tokenizer that the flags select, and the vocabulary size that follows from it).
"""
