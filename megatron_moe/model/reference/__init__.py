"""The single-device model in plain PyTorch: the oracle of every layout."""
