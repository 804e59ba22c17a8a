"""Code that travels with exported weights: OpenMoE for `transformers`.

The `FILES` are copied next to the weights, where `AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)` imports them. They import torch, transformers, SentencePiece and the
configuration beside them, and nothing of this project, which `tools/check_architecture.py`
enforces.
"""

from __future__ import annotations

from pathlib import Path

_PARTS = ("configuration", "modeling", "tokenization")
FILES = tuple(Path(__file__).with_name(f"{part}_openmoe.py") for part in _PARTS)
"""The files to copy."""
TOKENIZATION = FILES[-1]
"""The one with the tokenizer class, which imports none of the others."""
AUTO_MAP = {
    "AutoConfig": "configuration_openmoe.OpenMoeConfig",
    "AutoModel": "modeling_openmoe.OpenMoeModel",
    "AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM",
}
"""`auto_map` of `config.json`: the class of each factory of `transformers`."""
TOKENIZER_CONFIG = {
    "tokenizer_class": "OpenMoeTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_openmoe.OpenMoeTokenizer", None]},
}
"""`tokenizer_config.json` beside a SentencePiece model."""
