"""The network: logical parameters, the single-device reference, counts, and the parallel model.

Import the modules by name; this package imports nothing, so that counting stays cheap.
"""
