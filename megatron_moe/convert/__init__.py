"""Checkpoints of other programs and ours, one tensor at a time: native, Hugging Face, t5x.

A format is read into a `Model`, whose tensors have our logical names and are read when they are
asked for, and written from one. See docs/conversion.md.
"""
