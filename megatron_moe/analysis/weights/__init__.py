"""Weights of experts and routers, a layer at a time: comparisons, matching, components.

`survey.py` reads each tensor once and reduces it to a few small arrays; `matching.py` assigns the
neurons of two experts to each other; `statistics.py` has the formulas and chance levels that both
and the analyses use; `figures.py` their plots.
"""
