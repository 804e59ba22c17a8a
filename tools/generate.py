r"""Generate text from a checkpoint, with the single-device reference model.

The checkpoint names its tokenizer; `--tokenizer-model` says where that file is now. Nothing is
dropped by default, as capacity would let the text's length decide which tokens are computed.

    python tools/generate.py --load checkpoints --prompt "def read(self, size):" \
        --max-new-tokens 64 --temperature 0.8 --top-p 0.9
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.data.tokenizer import Tokenizer, build_tokenizer
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError
from megatron_moe.model.reference import ReferenceOpenMoE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens whose probabilities reach p together; 1 for all."""

    def check(self) -> None:
        """Refuse what is no distribution.

        Raises:
            UsageError: a value is out of range.
        """
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError("--temperature", self.temperature, "a number of at least 0")
        if self.top_k < 0:
            raise UsageError("--top-k", self.top_k, "at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError("--top-p", self.top_p, "above 0 and at most 1")


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token: temperature first, then top-k, then top-p of what is left.

    Args:
        logits_V: fp32, on the CPU.
        sampling: how.
        generator: source of randomness.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    best = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    logits_V = best.values[: sampling.top_k or None]
    probs_V = logits_V.softmax(dim=-1)
    # A token stays if those before it have not reached p: the one that reaches it is in.
    before_V = probs_V.cumsum(dim=-1) - probs_V
    probs_V = probs_V.where(before_V < sampling.top_p, 0.0)
    return int(best.indices[torch.multinomial(probs_V, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: ReferenceOpenMoE,
    prompt: Sequence[int],
    *,
    tokens: int,
    vocab_size: int,
    eod: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[int]:
    """New token ids after a prompt, until an end of document, which is not given.

    Args:
        model: runs a full forward pass per token.
        prompt: ids, at least one.
        tokens: how many at most.
        vocab_size: ids that the tokenizer has; padding beyond is never drawn.
        eod: id that ends the text.
        sampling: how tokens are chosen.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    ids = list(prompt)
    for _ in range(tokens):
        tokens_BS = torch.tensor([ids], device=device)
        x_BSH, _ = model.hidden_states(tokens_BS, training_capacity=False)
        logits_V = model.logits(x_BSH[0, -1])[:vocab_size].float().cpu()
        token = next_token(logits_V, sampling, generator)
        if token == eod:
            return
        ids.append(token)
        yield token


def load_model(options: argparse.Namespace, config: RunConfig) -> ReferenceOpenMoE:
    """The checkpoint's weights in the reference model, ready for inference."""
    from megatron_moe.checkpoint import load_logical, read_metadata

    moe = config.moe
    if not options.drop_tokens:
        moe = replace(moe, moe_eval_capacity_factor=None)
    vocab_size = read_metadata(options.load, options.ckpt_step).padded_vocab_size
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = ReferenceOpenMoE(
        config.model, moe, vocab_size, seed=None, device=options.device, dtype=dtype
    )
    model.load_logical(load_logical(options.load, options.ckpt_step))
    return model.eval()


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: PyTorch does not know it, or this machine has none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError("--device", device, "a device of this machine", reason) from None


def load_tokenizer(options: argparse.Namespace, config: RunConfig) -> Tokenizer:
    """The tokenizer that the checkpoint was trained with.

    Raises:
        UsageError: its file is missing, or is another tokenizer's.
    """
    from megatron_moe.checkpoint import read_metadata

    data = config.data
    if options.tokenizer_model is not None:
        data = replace(data, tokenizer_model=options.tokenizer_model)
    tokenizer = build_tokenizer(data)
    trained = read_metadata(options.load, options.ckpt_step).tokenizer_hash
    if trained and trained != tokenizer.identity:
        raise UsageError(
            "--tokenizer-model",
            data.tokenizer_model,
            f"the tokenizer of the checkpoint ({trained[:12]}...)",
        )
    return tokenizer


def run(options: argparse.Namespace) -> None:
    """Generate, and print prompt and continuation.

    Raises:
        UsageError: a flag, the checkpoint or the tokenizer is wrong.
    """
    # Imported late, so that --help is quick.
    from megatron_moe.checkpoint import read_config

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    sampling.check()
    if options.max_new_tokens < 1:
        raise UsageError("--max-new-tokens", options.max_new_tokens, "at least 1")
    check_device(options.device)
    config = read_config(options.load, options.ckpt_step)
    tokenizer = load_tokenizer(options, config)
    # A document begins after the end of another: that is what an empty prompt continues.
    prompt = tokenizer.tokenize(options.prompt) or [tokenizer.eod]
    if max(prompt) >= tokenizer.vocab_size or min(prompt) < 0:
        raise UsageError("--prompt", options.prompt, f"ids from 0 to {tokenizer.vocab_size - 1}")
    longest, length = config.model.max_position_embeddings, len(prompt) + options.max_new_tokens
    if length > longest:
        raise UsageError(
            "--max-new-tokens",
            options.max_new_tokens,
            f"at most {max(longest - len(prompt), 0)}: the prompt has {len(prompt)} tokens, "
            f"--max-position-embeddings is {longest}",
        )
    new = generate(
        load_model(options, config),
        prompt,
        tokens=options.max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sampling=sampling,
        seed=options.seed,
    )
    print(tokenizer.detokenize([*prompt, *new]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoints of a run")
    add("--ckpt-step", type=int, help="step to load (the newest)")
    add("--prompt", default="", help="text to continue (none: a new document)")
    add("--max-new-tokens", type=int, default=64, help="at most this many (64)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (1)")
    add("--top-k", type=int, default=0, help="draw from the k most probable; 0 for all (0)")
    add("--top-p", type=float, default=1.0, help="draw from the most probable up to p (1)")
    add("--seed", type=int, default=1234, help="of the draws (1234)")
    add("--tokenizer-model", metavar="FILE", help="where the tokenizer is now")
    add("--drop-tokens", action="store_true", help="use the evaluation capacity of the run")
    add("--bf16", action="store_true", help="compute in bfloat16 instead of fp32")
    add("--device", default="cpu", help="device of PyTorch, e.g. cuda (cpu)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    try:
        run(options)
    except UsageError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None


if __name__ == "__main__":
    main()
