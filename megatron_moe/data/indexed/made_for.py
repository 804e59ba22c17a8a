"""Whether indexed data was made for this run, as far as its manifest says: `PREFIX.json`.

Data without a manifest (Megatron-LM writes none) is taken as it is.
"""

from __future__ import annotations

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import extra_planes
from megatron_moe.data.indexed.manifest import files_fit, manifest_path, read_manifest
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer


def check_manifest(prefix: str, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse data that would be misread without any error.

    `NullTokenizer` knows nothing of texts and takes the ids of every other.

    Raises:
        UsageError: the manifest is none or of other files, the ids are another tokenizer's, or
            documents are to be told apart and have no ends.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    if not files_fit(prefix, manifest):
        raise UsageError(
            "manifest",
            str(manifest_path(prefix)),
            f"that of {prefix}.bin and {prefix}.idx, which are of other sizes",
            "preprocess again, or remove it if you know what the files are",
        )
    named = config.data.tokenizer_type != "NullTokenizer"
    if named and manifest.tokenizer_hash != tokenizer.identity:
        raise UsageError(
            f"tokenizer of {prefix}",
            f"{manifest.tokenizer} {manifest.tokenizer_hash}",
            f"this run's {config.data.tokenizer_type} {tokenizer.identity}",
            "give the tokenizer that the data was made with, or preprocess again",
        )
    if extra_planes(config.objective) and not manifest.append_eod:
        raise UsageError(
            f"documents of {prefix}",
            "without ends",
            "an end after each, for --reset-position-ids and --reset-attention-mask",
            "preprocess with --append-eod",
        )
