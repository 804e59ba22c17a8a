"""Indexed datasets: Megatron-LM's `.bin` and `.idx` files, and a manifest in `.json`.

Reading order: `format` (the layout of the files), `writer` (makes them), `check` (opens them, in
milliseconds at every start), `scan` (reads all of them, once per content), `cache` (keeps results
of scans and sample indices), `manifest` (what a dataset was made from, and whether it suits a run),
`merge` and `inspection` (what the tools do).
"""
