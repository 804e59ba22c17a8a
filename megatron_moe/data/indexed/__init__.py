"""Indexed datasets (Megatron-LM's `.bin` and `.idx`): format, writer, checks, merge."""
