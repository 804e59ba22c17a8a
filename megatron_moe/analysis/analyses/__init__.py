"""The analyses; each file is one question. `base.py` has the interface and finds them."""
