r"""Train a SentencePiece tokenizer: unigram or byte pairs, byte fallback, umT5's special ids.

pad = 0, eos = 1, unk = 2, no beginning-of-sequence id. Decoding restores the text exactly: white
space and line ends are kept, nothing is normalised, and characters without a piece are encoded as
bytes. (The only exception is U+2581, SentencePiece's own sign for a space.)

    python tools/train_tokenizer.py --input corpus/code.jsonl corpus/text.jsonl \
        --output tokenizer.model --vocab-size 8192
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_moe.command_line import Parser
from megatron_moe.data.preprocess.inputs import cut, find_inputs
from megatron_moe.data.preprocess.reading import read_batches
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.tokenizer.base import EOS, PAD, UNK

_SENTENCE = 2048
"""Characters of a training sentence; the trainer ignores sentences of more than 4192 bytes."""


def sentences(paths: Sequence[str], key: str, megabytes: float) -> Iterator[str]:
    """Yield sentences of the files, an equal share from each file, with a progress bar."""
    share = megabytes * 1e6 / len(paths)
    with progress_bar(int(share * len(paths)), " characters") as bar:
        for piece in _sentences(paths, key, share):
            yield piece
            bar.update(len(piece))
        bar.total = bar.n  # there may be less text than requested


def _sentences(paths: Sequence[str], key: str, share: float) -> Iterator[str]:
    for path in paths:
        room = share
        for text in texts(path, key):
            for start in range(0, len(text), _SENTENCE):
                piece = text[start : start + _SENTENCE]
                yield piece
                room -= len(piece)
            if room <= 0:
                break


def texts(path: str, key: str) -> Iterator[str]:
    """Yield the texts of a file of any format that tools/preprocess_data.py reads."""
    for piece in cut(find_inputs([path]), 1)[0]:
        for batch in read_batches(piece, [key], "file"):
            done = 0
            try:
                for (fields,) in batch.documents([key]):
                    yield from (text.decode() for text in fields)
                    done += 1
            except UsageError as error:
                what = f"{error.what}, {batch.place(done)}"
                raise UsageError(what, error.found, error.expected, error.fix) from None


def train(options: argparse.Namespace) -> bytes:
    """The model file's content."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(options.input, options.json_key, options.megabytes),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.vocab_size,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()[-12:])
        raise UsageError(
            "--vocab-size", options.vocab_size, "a size that the text can fill", reason
        ) from None
    return model.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser("train_tokenizer.py", __doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files")
    parser.add_argument("--output", required=True, type=Path, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces (8192)")
    parser.add_argument(
        "--model-type",
        choices=["unigram", "bpe"],
        default="unigram",
        help="unigram as in umT5, or byte pairs, encoded word by word (unigram)",
    )
    parser.add_argument("--json-key", default="text", help="field of the text (text)")
    parser.add_argument("--megabytes", type=float, default=4.0, help="text to train on (4)")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"training {options.vocab_size} pieces on up to {options.megabytes:g} MB ...", flush=True)
    partial = options.output.with_name(options.output.name + ".partial")
    with exit_on_usage_error("train_tokenizer.py", OSError):
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            # Opened before the training, which takes long, so that a bad path is reported at once.
            with partial.open("wb") as stream:
                stream.write(train(options))
            os.replace(partial, options.output)
        except (UsageError, OSError):
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    print(f"{options.output}: {options.vocab_size} pieces in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
