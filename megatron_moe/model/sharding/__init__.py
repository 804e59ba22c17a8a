"""Logical tensors and the local parameters that hold blocks of them, in any layout."""
