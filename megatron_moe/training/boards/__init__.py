"""Boards besides TensorBoard and Weights & Biases, one a file.

`boards/NAME.py` defines a subclass of `sinks.BoardSink` and registers a function that opens it with
`@BOARDS.register("NAME")`. NAME is then accepted by `--log-boards NAME=PROJECT`.
"""
