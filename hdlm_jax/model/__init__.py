"""Noised tokens -> logits; the only room that knows flax."""
