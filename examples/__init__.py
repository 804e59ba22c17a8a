"""Launch scripts, and experiments on routing."""
