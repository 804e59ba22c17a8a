"""Families of MoE models of other programs; each file describes one. See `family.py`."""
