"""From a corpus to an indexed dataset: reading, encoding, worker processes, resumption."""
