"""Checkpoint conversion, one tensor at a time: native, Hugging Face, t5x; upcycling; inspection.

`formats.py` reads a checkpoint into a `LogicalModel` (`model.py`), whose tensors have logical names
and are read when needed, and writes one in another format. See docs/conversion.md.
"""
