"""Papers whose figures can be drawn; each file is one. `paper.py` has the interface and finds them.

Colours are those of this project, which readers with any colour vision tell apart.
"""
