"""Using a trained model on one device: loading, generation, perplexity, evaluation harness."""
