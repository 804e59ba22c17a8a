"""Drop policies besides the built-in ones, one a file.

`drop_policies/NAME.py` defines a function of the type `moe.dropping.DropPolicy` and registers it
with `@DROP_POLICIES.register("NAME")`. It is then a value of `--moe-token-drop-policy`.
"""
