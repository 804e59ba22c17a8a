r"""Train a SentencePiece tokenizer: unigram or byte pairs, byte fallback, umT5's special ids.

pad = 0, eos = 1, unk = 2, no beginning-of-sequence id. Decoding restores the text exactly: white
space and line ends are kept, nothing is normalised, and characters without a piece are encoded as
bytes. (The only exception is U+2581, SentencePiece's own sign for a space.) A table shows for each
script how many characters have no piece, and tokens per character.

    python tools/train_tokenizer.py --input corpus/code.jsonl corpus/text.jsonl \
        --output tokenizer.model --vocab-size 8192
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from megatron_moe.command_line import Parser
from megatron_moe.data.preprocess.inputs import cut, find_inputs
from megatron_moe.data.preprocess.reading import BATCH, read_batches
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.text import LONGEST_RECORD
from megatron_moe.tokenizer.base import EOS, PAD, UNK
from megatron_moe.tokenizer.coverage import ScriptSample, coverage_table, coverage_warnings

_SENTENCE = 2048
"""Characters of a training sentence."""
_SENTENCE_BYTES = 4192
"""Bytes of a training sentence: the trainer leaves out longer ones (its `max_sentence_length`)."""
_RESERVED = "\u2585"
"""The trainer leaves out every sentence with this character, which it uses itself."""


@dataclass
class Corpus:
    """The training text: an equal share of each file, in sentences of the trainer."""

    paths: Sequence[str]
    key: str
    """Field of the text."""
    characters: float
    """Of all files together, at most."""
    most: int = LONGEST_RECORD
    """Bytes of the longest line or row."""
    sample: ScriptSample = field(default_factory=ScriptSample)
    reserved: int = 0
    """Reserved characters that were left out so far."""
    unread: list[str] = field(default_factory=list)
    """Files of which only the beginning was read."""
    error: UsageError | None = None
    """Raised by a bad file. The trainer turns it into an error of its own."""

    def sentences(self) -> Iterator[str]:
        """Yield the sentences, with a progress bar."""
        share = self.characters / len(self.paths)
        try:
            with progress_bar(int(share * len(self.paths)), " characters") as bar:
                for sentence in self._sentences(share):
                    yield sentence
                    bar.update(len(sentence))
                bar.total = bar.n  # there may be less text than requested
        except UsageError as error:
            self.error = error
            raise

    def _sentences(self, share: float) -> Iterator[str]:
        for path in self.paths:
            room = share
            for text in texts(path, self.key, self.most):
                if room <= 0:
                    self.unread.append(path)
                    break
                for sentence in cut_text(text):
                    room -= len(sentence)
                    self.sample.add(sentence)
                    self.reserved += sentence.count(_RESERVED)
                    yield from filter(None, sentence.split(_RESERVED))


def cut_text(text: str) -> Iterator[str]:
    """Cut a text into pieces that the trainer accepts: by characters, and by their bytes.

    Example: 5000 Latin letters are cut into 2048, 2048 and 904. A Chinese character has three
    bytes, so 5000 are cut into 1397, 1397, 1397 and 809.
    """
    start = 0
    while start < len(text):
        piece = text[start : start + _SENTENCE]
        content = piece.encode()
        if len(content) > _SENTENCE_BYTES:
            piece = content[:_SENTENCE_BYTES].decode(errors="ignore")  # without a torn character
        yield piece
        start += len(piece)


def texts(path: str, key: str, most: int = LONGEST_RECORD) -> Iterator[str]:
    """Yield the texts of a file of any format that tools/preprocess_data.py reads."""
    for piece in cut(find_inputs([path]), 1)[0]:
        for batch in read_batches(piece, [key], "file", most):
            done = 0
            try:
                for (fields,) in batch.documents([key]):
                    yield from (text.decode() for text in fields)
                    done += 1
            except UsageError as error:
                flag = error.what.replace("--json-keys", "--json-key")
                what = f"{flag} in {batch.place(done)}"
                raise UsageError(what, error.found, error.expected, error.fix) from None


def train(options: argparse.Namespace, corpus: Corpus) -> bytes:
    """Return the content of the model file.

    Raises:
        UsageError: the text cannot be read, or does not suit the size of the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus.sentences(),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.vocab_size,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=options.character_coverage,
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
        raise corpus.error or _reason(str(error), options) from None
    return model.getvalue()


def _reason(message: str, options: argparse.Namespace) -> UsageError:
    """Return the trainer's error in terms of the flags."""
    size = options.vocab_size
    if few := re.search(r"required_chars\. \d+ vs (\d+)", message):
        expected = f">= {few[1]}, the characters and bytes that every model of this text has"
        return UsageError("--vocab-size", size, expected, "or lower --character-coverage")
    if many := re.search(r"set it to a value <= (\d+)", message):
        expected = f"<= {many[1]}, the pieces that this text can fill"
        return UsageError("--vocab-size", size, expected, "or train on more text (--megabytes)")
    if "!sentences_.empty()" in message:
        expected = f"one or more documents with text in {options.json_key!r}"
        return UsageError("--input", "no text", expected)
    return UsageError("--vocab-size", size, "trainable", " ".join(message.split()))


def check(options: argparse.Namespace) -> None:
    """Check the numbers.

    Raises:
        UsageError: a number is out of range.
    """
    if options.vocab_size < 1:
        raise UsageError("--vocab-size", options.vocab_size, ">= 1")
    if options.max_record_bytes < BATCH:
        raise UsageError("--max-record-bytes", options.max_record_bytes, f">= {BATCH}")
    if not options.megabytes > 0:
        raise UsageError("--megabytes", options.megabytes, "> 0")
    if not 0.98 <= options.character_coverage <= 1:  # the trainer's own range
        raise UsageError("--character-coverage", options.character_coverage, ">= 0.98 and <= 1")


def report(corpus: Corpus, model: bytes) -> None:
    """Print what the model covers, and warn about text that was left out or is not covered."""
    found = corpus.sample.coverage(model)
    print(coverage_table(found))
    warnings = coverage_warnings(found)
    if corpus.reserved:
        reason = "U+2585, which SentencePiece reserves, was left out"
        warnings.append(f"{reason} {corpus.reserved} times; it is encoded as bytes")
    if corpus.unread:
        files = ", ".join(corpus.unread[:3]) + (", ..." if len(corpus.unread) > 3 else "")
        warnings.append(f"only the beginning was read (--megabytes) of {files}")
    for line in warnings:
        print(f"train_tokenizer.py: warning: {line}", file=sys.stderr)


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
    parser.add_argument(
        "--megabytes", type=float, default=4.0, help="million characters to train on (4)"
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of all characters that get a piece; bytes encode the others (0.9995)",
    )
    longest = f"longest line or row; largest window of .zst ({LONGEST_RECORD})"
    parser.add_argument("--max-record-bytes", type=int, default=LONGEST_RECORD, help=longest)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"training {options.vocab_size} pieces on up to {options.megabytes:g} MB ...", flush=True)
    partial = options.output.with_name(options.output.name + ".partial")
    with exit_on_usage_error("train_tokenizer.py", OSError):
        check(options)
        corpus = Corpus(
            options.input, options.json_key, options.megabytes * 1e6, options.max_record_bytes
        )
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            # Opened before the training, which takes long, so that a bad path is reported at once.
            with partial.open("wb") as stream:
                model = train(options, corpus)
                stream.write(model)
            os.replace(partial, options.output)
        except (UsageError, OSError):
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        report(corpus, model)
    print(f"{options.output}: {options.vocab_size} pieces in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
