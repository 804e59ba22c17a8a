"""Inference on one device with the reference model: generation, perplexity, lm-eval.

`loading.py` loads a checkpoint and its tokenizer. `generation.py` generates, `output.py` prints;
`perplexity.py` and `held_out.py` evaluate data, `harness.py` runs tasks of lm-eval.
"""
