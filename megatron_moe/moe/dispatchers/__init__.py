"""Dispatchers besides the built-in one, one a file.

`dispatchers/NAME.py` defines a subclass of `moe.dispatcher.TokenDispatcher` and registers it with
`@DISPATCHERS.register("NAME")`. It is then a value of `--moe-token-dispatcher-type`.
"""
