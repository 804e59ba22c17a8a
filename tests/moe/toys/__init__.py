"""A router, a drop policy and a dispatcher as a contributor would add them, one a file.

`tests/moe/test_extending.py` imports them, and copies them into the folders of a copied tree.
"""
