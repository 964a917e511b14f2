"""Rotary positions beyond the training length (LongLLaDA)."""

from __future__ import annotations

import math

from hdlm_jax.models.network import Network

# ---------------------------------------------------------------------------------------------------- longer sequences


def rope_scale(seq_len: int, trained_len: int, dim: int, base: float = 10_000.0) -> float:
    """Lambda >= 1 by which the rotary base grows for sequences longer than trained (LongLLaDA, arXiv 2506.14429).

    The d' = 2 ceil(d/2 log_base(L/2 pi)) dimensions that came full circle within the trained length L are those that
    may still do so at seq_len: lambda = (seq_len/2 pi)^(d/d') / base; 1 up to the trained length. The release rounds
    up: 4, 14, 31, 55 for LLaDA (4096 trained, d = 128, base 500000) at 8, 16, 24 and 32 thousand tokens.

    Args:
      seq_len, trained_len: in tokens. dim: d, width of a head. base: of the network's rotary positions.

    Raises:
      ValueError: sizes that are not positive, or trained_len < 7: no dimension came full circle.
    """
    if seq_len < 1 or dim < 2 or base <= 1:
        raise ValueError(f"seq_len={seq_len}, dim={dim}, base={base}: must be at least 1, at least 2, and above 1")
    if trained_len < 7:
        raise ValueError(f"trained_len={trained_len}: must be at least 7, or no rotary dimension came full circle")
    full = 2 * math.ceil(dim / 2 * math.log(trained_len / (2 * math.pi), base))
    return max(1.0, (seq_len / (2 * math.pi)) ** (dim / full) / base) if seq_len > trained_len else 1.0


def extended(network: Network, seq_len: int, trained_len: int) -> Network:
    """The network for sequences of seq_len tokens, trained at trained_len (LongLLaDA, arXiv 2506.14429).

    The parameters stay as they are; up to the trained length it is the same network. Errors: see `rope_scale`.
    """
    scale = rope_scale(seq_len, trained_len, network.width // network.heads, network.rope_base)
    return network.clone(rope_base=network.rope_base * scale)
