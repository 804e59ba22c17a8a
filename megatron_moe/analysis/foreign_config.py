"""`config.json` of another program's MoE model: its family and settings, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.analysis.family import Family, all_families
from megatron_moe.analysis.rule import RoutingRule
from megatron_moe.checkpoint.disk import read_json
from megatron_moe.convert.hf_files import MANY, SIZE, whole_number
from megatron_moe.errors import Corrupt, UsageError

CONFIG = "config.json"
_COUNTS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "n_group",
    "topk_group",
)
_SIZES = ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ForeignSettings:
    """Settings of a model, from its directory.

    Args:
        model_type: key in `all_families()`.
        family: its entry.
        config: configuration object of the family's class in `transformers`.
        rule: routing rule.
        moe_layers: indices of the MoE layers.
        num_experts: E.
    """

    model_type: str
    family: Family
    config: Any
    rule: RoutingRule
    moe_layers: tuple[int, ...]
    num_experts: int


def transformers() -> Any:
    """Import `transformers`.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("transformers")
    except ImportError:
        expected = "installed for models of other programs"
        fix = "pip install 'megatron-moe[hf]'"
        raise UsageError("package transformers", "missing", expected, fix) from None


def is_foreign(path: Path) -> bool:
    """Whether a directory holds one Hugging Face model, with a `model_type`, rather than a run."""
    return (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG)


def read_settings(path: Path) -> ForeignSettings:
    """Read and check `config.json` of a directory.

    Raises:
        UsageError: `transformers` is not installed, the family is unknown, or the file is missing,
            damaged or has values that the family does not support.
    """
    values, source = read_json(path / CONFIG), str(path / CONFIG)
    kind = values.get("model_type")
    families = all_families()
    family = families.get(kind) if isinstance(kind, str) else None
    if family is None:
        fix = "OpenMoE and Llama are read by tools/convert_checkpoint.py --from hf"
        raise UsageError(f"model_type in {source}", kind, f"one of {', '.join(families)}", fix)
    # What counts is the weights: programs that convert them leave this field behind.
    values.pop("quantization_config", None)
    _check_numbers(values, source)
    package = transformers()
    try:
        config = family.configuration(package, path, values, source)
        vars(config).pop("quantization_config", None)
        found = ForeignSettings(
            model_type=str(kind),
            family=family,
            config=config,
            rule=family.rule(config),
            moe_layers=tuple(family.moe_layers(config)),
            num_experts=getattr(config, family.experts),
        )
        _check_rule(found, source)
    except UsageError:
        raise
    except Exception as error:  # the class may raise anything for wrong values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Corrupt(source, reason, f"valid for {family.label}") from None
    return found


def _check_numbers(values: dict[str, Any], source: str) -> None:
    """Bound the numbers before a class allocates lists of them."""
    for keys, most in ((_COUNTS, MANY), (_SIZES, SIZE)):
        for key in keys:
            if values.get(key) is not None:
                whole_number(values, key, source, most=most)
    dense = values.get("first_k_dense_replace")
    if dense is not None:
        whole_number({"first_k_dense_replace": dense or 1}, "first_k_dense_replace", source)


def _check_rule(found: ForeignSettings, source: str) -> None:
    rule, experts = found.rule, found.num_experts
    if rule.topk > experts:
        raise Corrupt(
            f"num_experts_per_tok in {source}", rule.topk, f"<= the number of experts ({experts})"
        )
    if experts % rule.groups or rule.kept_groups > rule.groups:
        groups = f"{rule.kept_groups} of {rule.groups}"
        expected = f"a subset of equal groups of {experts} experts"
        raise Corrupt(f"topk_group and n_group in {source}", groups, expected)
