"""Tokenizer for `transformers` of a SentencePiece model beside this file, with the same ids.

`transformers` would convert the model to another library, which is exact for the files of some
families only. Text is text: names of special tokens in it are not special tokens, as in training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer


class OpenMoeTokenizer(PreTrainedTokenizer):
    """A SentencePiece model; nothing is added at the start or the end of a text.

    Args:
        vocab_file: `tokenizer.model`.
        spiece_file: the same file by T5's name, `spiece.model`.
        bpe_file: the same file by XLM-R's name, `sentencepiece.bpe.model`.
        options: see `PreTrainedTokenizer`. Padding is on the left by default, as for generation.
    """

    vocab_files_names = {  # noqa: RUF012 a table that the base class reads
        "vocab_file": "tokenizer.model",
        "spiece_file": "spiece.model",
        "bpe_file": "sentencepiece.bpe.model",
    }
    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | None = None,
        spiece_file: str | None = None,
        bpe_file: str | None = None,
        **options: Any,
    ) -> None:
        self.vocab_file = vocab_file or spiece_file or bpe_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        for role in ("unk", "bos", "eos", "pad"):
            number = getattr(self.model, f"{role}_id")()
            if number >= 0:
                options.setdefault(f"{role}_token", self.model.id_to_piece(number))
        options.setdefault("padding_side", "left")
        options.setdefault("split_special_tokens", True)
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self.model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Pieces and their ids."""
        pieces = {self.model.id_to_piece(number): number for number in range(self.vocab_size)}
        return {**pieces, **self.get_added_vocab()}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found: list[str] = self.model.encode(text, out_type=str)
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        # The network has rows for more ids, up to a round number.
        known = index if index < self.vocab_size else self.model.unk_id()
        return str(self.model.id_to_piece(known))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces, with the names of special ones, which SentencePiece leaves out."""
        special = {self.eos_token, self.bos_token, self.pad_token}
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in special:
                text += f"{self.model.decode_pieces(run)}{token}"
                run = []
            else:
                run.append(token)
        return f"{text}{self.model.decode_pieces(run)}"

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids alone."""
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the model file to a folder."""
        assert self.vocab_file is not None
        target = Path(save_directory) / f"{filename_prefix or ''}{Path(self.vocab_file).name}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
