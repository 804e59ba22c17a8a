"""The training loop: step, optimizer, learning rate, evaluation, metrics, resume."""
