"""Text to batches: documents, tokenizers, shards, rows, and clusters of tokens."""
