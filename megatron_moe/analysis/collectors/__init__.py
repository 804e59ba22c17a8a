"""What one pass over the tokens counts; each file is a collector that analyses share.

`COLLECTORS` finds them by the names in `Analysis.uses`.
"""
