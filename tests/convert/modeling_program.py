"""A program without this project: loads exported weights with `transformers` alone.

Run by `test_modeling_alone.py` as `python -I modeling_program.py FOLDER SITE PROMPTS`: isolated, so
without this checkout, and with the packages of SITE in place of an environment's path files, one of
which would add the checkout. Prints what it computed as JSON.
"""

import importlib.util
import json
import sys


def main(folder: str, site: str, tokens: str) -> None:
    sys.path.append(site)
    assert importlib.util.find_spec("megatron_moe") is None, "this project can be imported"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(json.loads(tokens))
    with torch.no_grad():
        logits = model(ids).logits
    chosen = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = {
        "class": type(model).__name__,
        "config": type(config).__name__,
        "logits": logits.tolist(),
        "chosen": chosen.tolist(),
        "ours": sorted(name for name in sys.modules if name.startswith(("megatron", "fused"))),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
