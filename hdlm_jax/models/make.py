"""The network of a config, and what a token costs it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.adjust import Adjust
from hdlm_jax.models.channel import WAVES, ChannelHead, ChannelNetwork
from hdlm_jax.models.choices import HEADS, ChoosingDecoder, ChoosingNetwork
from hdlm_jax.models.decoder import Decoder
from hdlm_jax.models.energy import EnergyNetwork, ScalarHead
from hdlm_jax.models.heads import FactorisedHead, FlatHead, Head
from hdlm_jax.models.latents import LatentHead, LatentNetwork
from hdlm_jax.models.looped import LoopedDecoder
from hdlm_jax.models.network import Network, Transformer
from hdlm_jax.models.soft import SoftHead


def make_network(config: Config, hierarchy: Hierarchy) -> Transformer:
    """The network of config.model for a hierarchy's tokens and states; or what train.objective makes beside one: an
    EnergyNetwork; a layer (Adjust), which has parameters as a network does, and none of its answers."""
    m, d = config.model, config.diffusion
    channel, latents = (d.channel_width if d.channel else 0), d.latents
    if config.train.objective == "adjust":
        return cast(Transformer, Adjust(m.width, m.heads, m.dtype))
    dtype = jnp.dtype(m.dtype)
    head = (ChannelHead(hierarchy, dtype, channel=channel) if channel else
            LatentHead(hierarchy, dtype, latent=d.latents_width) if latents else
            SoftHead(hierarchy, dtype, xi=d.xi) if config.hierarchy.map == "learned" else
            FlatHead(hierarchy, dtype, config.decoder.softcap) if m.head == "flat" else
            FactorisedHead(hierarchy, dtype, m.prototypes))
    causal = d.process == "autoregressive"
    features = config.data.feature_places, config.data.feature_width
    sizes = (head, hierarchy.padded_states, m.width, m.blocks, m.heads, m.dtype, m.remat, causal, m.attention)
    if m.trunk == "decoder":
        more: dict[str, Any] = dict(block=m.block, features=features, tied=m.tied, dims=config.decoder,
                                    param_dtype=m.param_dtype)
        plain = LoopedDecoder if config.decoder.loops else Decoder
        return ChoosingDecoder(*sizes, **more, chooses=m.chooses) if m.chooses else plain(*sizes, **more)
    if config.train.objective == "energy":
        return EnergyNetwork(cast(Head, ScalarHead(hierarchy)), *sizes[1:], time_conditioning=m.time_conditioning)
    own: dict[str, Any] = dict(block=m.block, features=features, tied=m.tied, dropout=m.dropout,
                               time_conditioning=m.time_conditioning)
    if channel:
        return ChannelNetwork(*sizes, **own, channel=channel)
    if latents:
        own["features"] = latents, d.latents_width + 2 * WAVES
        return LatentNetwork(*sizes, **own, per=m.seq_len // latents)
    return ChoosingNetwork(*sizes, **own, chooses=m.chooses) if m.chooses else Network(*sizes, **own)


def joined(params: Tree, start: Tree) -> Tree:
    """A run's parameters; what `start` has beside them, of features and heads for choices, is as it starts."""
    return {name: start[name] for name in ("features", *HEADS) if name in start} | params


def flops_per_token(config: Config, hierarchy: Hierarchy, process: Process) -> float:
    """FLOPs of a forward and backward pass a token, as the algorithm needs them: 3 times the forward pass, or 2 times
    with decoder.lora, as weights that stay have no gradient (of attention between tokens the third one is left out).
    Of decoder.loops the last decoder.loops_back have a backward pass."""
    n, forward = config.decoder, forward_flops(config, hierarchy, process)
    back = dataclasses.replace(config, decoder=dataclasses.replace(n, loops=min(n.loops, n.loops_back)))
    return forward + forward_flops(back, hierarchy, process) * (1 if n.lora else 2)


def forward_flops(config: Config, hierarchy: Hierarchy, process: Process) -> float:
    """FLOPs of a forward pass a token, 2 per multiply-add.

    Trunk products and attention for every token; the head for those that are noised, t uniform: all words in the flat
    one; in the factorised one all prototypes where clusters are asked for, at level 1 an average cluster's words (all,
    where the loss is of all).
    """
    m = config.model
    trunk = (_decoder_products(config) if m.trunk == "decoder" else
             m.blocks * (12 * m.width**2 + 2 * m.seq_len * m.width))
    trunk *= 2 if m.block else 1 + config.diffusion.latents / m.seq_len  # a clean copy beside the noised one; latents
    share = process.shares()
    rows = (1 - share[0]) * hierarchy.vocab_size
    if m.head == "factorised":
        nodes, needs = hierarchy.of_head.sizes[1], process.needs()
        words = hierarchy.vocab_size / (1 if needs == "tokens" else nodes)
        rows = share[2 if needs == "within" else 1 :].sum() * nodes * m.prototypes + share[1] * words
    return float(2.0 * (trunk + m.width * rows))


def _decoder_products(config: Config) -> float:
    """Multiply-adds of the decoder's blocks for a token."""
    m, n = config.model, config.decoder
    kv, dim, inner = n.sizes(m)
    blocks = n.passed(m.blocks)
    dense = n.dense_blocks if n.experts else blocks
    experts = n.experts_per_token * n.expert_inner + n.shared_inner + n.experts / 3
    attention = 2 * dim * (m.width * (m.heads + kv) + m.seq_len * m.heads)
    adapter = 2 * n.loops * m.width**2
    return blocks * attention + 3 * m.width * (dense * inner + (blocks - dense) * experts) + adapter
