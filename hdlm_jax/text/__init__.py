"""Text -> tokens -> batches, and the hierarchy of words and clusters."""
