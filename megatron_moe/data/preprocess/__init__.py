"""From a corpus of text files to an indexed dataset.

Reading order, which is the path of a line of JSON Lines: `reading` (files -> batches of documents
-> texts), `encoding` (worker processes: texts -> ids, and into the writer), then
`data.indexed.writer` (ids -> `.bin` and `.idx`). Around it: `inputs` (which files, cut into
partitions), `corpus` (which partitions are to be made, resuming, merging), `zstd`.
"""
