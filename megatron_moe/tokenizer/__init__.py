"""Tokenizers: SentencePiece, Hugging Face, byte-level, and the one a run asks for (`build`)."""
