"""Routers besides the built-in one, one a file.

`routers/NAME.py` defines a subclass of `moe.router.Router` and registers it with
`@ROUTERS.register("NAME")`. It is then a value of `--moe-router-type`. Its `forward` returns
`Scores`: losses, statistics and the dispatcher read nothing else.
"""
