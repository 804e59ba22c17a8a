"""The operations in plain torch, with the backward pass by hand where that saves passes."""
