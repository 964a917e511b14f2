"""Recurrent depth (Huginn, arXiv 2502.05171): a causal decoder, some of whose blocks are passed R times.

    e = prelude(tokens);   s <- norm(core(adapter [s, e])), R times;   hidden = norm(coda(s))

The state s [D] of a position starts at 0; in training at noise, and R is drawn, so that the loop learns to end at the
same place from anywhere. With R iterations of every position this is the plain stack prelude, core, .., core, coda, and
its likelihood is exact. A cache holds keys and values of each iteration of a position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.models.attention import Seen
from hdlm_jax.models.decoder import Block, Decoder, Product, RMSNorm, put
from hdlm_jax.models.trunk import Cache

START = math.sqrt(0.4)  # standard deviation of the states that training starts from, as published
SPREAD, MOST = 0.5, 4  # of R in training: sigma of its log-normal rate, as published; at most so many times its mean
State: TypeAlias = tuple[jax.Array, ...]  # x [B, Q, D]; and keys and values, where there is a cache


class LoopBlock(Block):
    """A block of the loop. With a cache its `layer` is a pair: the slot of a token's own keys and values, int32 [B, Q],
    and of every token that it may see the slot that it reads, int32 [B, Q, S]."""

    def _kept(self, cache: Sequence[jax.Array], new: Sequence[jax.Array], layer: Any, position: jax.Array
              ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        slot, read = layer
        cache, row = put(cache, new, slot, position), jnp.arange(len(position))[:, None, None]
        k, v = (a[read, row, jnp.arange(read.shape[2])[None, None]] for a in cache)
        return cache, k, v

    def _attended(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
        if k.ndim == 4:
            return super()._attended(q, k, v, seen)
        (b, s), keys = q.shape[:2], k.shape[2]  # a query has keys of its own, as a row has
        mask = jnp.broadcast_to(jnp.asarray(seen.dense(s, keys)), (b, 1, s, keys)).reshape(b * s, 1, 1, keys)
        k, v = (a.reshape(b * s, *a.shape[2:]) for a in (k, v))
        return super()._attended(q.reshape(b * s, 1, *q.shape[2:]), k, v, Seen(mask=mask)).reshape(q.shape)


def drawn_loops(key: jax.Array, mean: int) -> jax.Array:
    """R of a training step, int32: 1 + Poisson of a log-normal rate whose mean is mean - 1; at most MOST * mean."""
    normal, poisson = jax.random.split(key)
    rate = (mean - 1) * jnp.exp(SPREAD * jax.random.normal(normal) - SPREAD**2 / 2)
    return jnp.minimum(1 + jax.random.poisson(poisson, rate), MOST * mean).astype(jnp.int32)


class LoopedDecoder(Decoder):
    """As Decoder, with parameters prelude, stack (the core), coda, adapter and state_norm in place of one stack."""

    def setup(self) -> None:
        super().setup()
        self.prelude, self.coda = self._some(Block, self.dims.prelude), self._some(Block, self.dims.coda)
        self.adapter = Product(self.width, False, jnp.dtype(self.dtype))
        self.state_norm = RMSNorm(self.dims.eps, self.dims.norm_offset)

    @property
    def core(self) -> int:
        """Blocks of the loop."""
        return self.blocks - self.dims.prelude - self.dims.coda

    def _blocks(self, dense: bool) -> nn.Module:
        return self._some(LoopBlock, self.core)

    def _some(self, block: type[Block], count: int) -> nn.Module:
        each = (nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast)
        return self.stacked(block, each, count)(self.dims, self.sizes, self.dims.passed(self.blocks),
                                                jnp.dtype(self.dtype), self.attention, self.attend)

    # ---- the parts, each as a function of the parameters: `apply` with its name --------------------------------------

    def enter(self, z: jax.Array, cache: State, seen: jax.Array | None, position: jax.Array | None) -> State:
        """e of states z [B, Q]; seen, position: as Trunk.hidden_at has them, or segments and None for whole rows."""
        return self._pass(self.prelude, (self._embed(z), *cache), jnp.arange(self.dims.prelude), seen, position)

    def iterate(self, s: State, e: jax.Array, layers: Any, seen: jax.Array | None, position: jax.Array | None) -> State:
        """The next state, of states s[0] and the inputs e, both float32 [B, Q, D]."""
        x = self.adapter(jnp.concatenate([s[0], e], axis=-1)).astype(jnp.float32)
        x, *cache = self._pass(self.stack, (x, *s[1:]), layers, seen, position)
        return self.state_norm(x), *cache

    def leave(self, s: State, seen: jax.Array | None, position: jax.Array | None) -> State:
        """Hidden states before the head."""
        layers = self.dims.prelude + jnp.arange(self.dims.coda)
        x, *cache = self._pass(self.coda, s, layers, seen, position)
        return self.norm(x), *cache

    def _pass(self, blocks: Any, x: State, layers: Any, seen: jax.Array | None, position: jax.Array | None) -> State:
        if position is None:
            place = jnp.arange(x[0].shape[1])[None]
            return blocks(*x, self._places(place, place.size), Seen.of(seen, True), False, layers, None)[0],
        found: State = blocks(x, self._places(position, x[1].shape[2]), Seen.of(seen), False, layers, position)[0]
        return found

    def trunk(self, z: jax.Array, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        """A single iteration, which makes all parameters; the loop is in `hidden`."""
        e = self.enter(z, (), segment, None)[0]
        s = self.iterate((jnp.zeros_like(e),), e, jnp.arange(self.core), segment, None)
        return self.leave(s, segment, None)[0]

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _run(self, part: str, params: Tree, *args: Any) -> State:
        found: Any = self.apply({"params": params}, *args, method=part)
        return found

    def hidden(self, params: Tree, z: jax.Array, t: jax.Array, segment: jax.Array | None = None,
               dropout: jax.Array | None = None, clean: jax.Array | None = None) -> jax.Array:
        """As Trunk.hidden. dropout: a key, in training: R is drawn, and the states that all rows start from; gradients
        go through the last decoder.loops_back iterations. None: decoder.loops of them, and through all."""
        e, layers = self._run("enter", params, z, (), segment, None)[0], jnp.arange(self.core)

        def iterate(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
            return self._run("iterate", params, (s,), e, layers, segment, None)[0]

        count: Any = self.dims.loops
        s, back = jnp.zeros_like(e), self.dims.loops
        if dropout is not None:
            of_count, of_start = jax.random.split(dropout)
            count, back = drawn_loops(of_count, self.dims.loops), self.dims.loops_back
            s = jnp.broadcast_to(START * jax.random.normal(of_start, (1, *e.shape[1:])), e.shape)
            kept, fixed = jax.lax.stop_gradient((params, e))
            s = jax.lax.fori_loop(0, jnp.maximum(count - back, 0), lambda _, s: iterate(kept, s, fixed), s)
        s, _ = jax.lax.scan(lambda s, i: (jnp.where(i < count, iterate(params, s, e), s), None), s, jnp.arange(back))
        return self._run("leave", params, (s,), segment, None)[0]

    def refined(self, params: Tree, z: jax.Array, cache: Cache, position: jax.Array, seen: jax.Array, s: jax.Array,
                made: jax.Array, times: int) -> tuple[jax.Array, jax.Array, Cache]:
        """(hidden states, latent states, cache) of some positions after `times` more iterations.

        Args:
          z, cache, position, seen: as Trunk.hidden_at has them.
          s: float32 [B, Q, D], their latent states. made: int32 [B, S], iterations that every position will have had.
            A position in its n-th iteration reads of each other one the n-th, or its last if it has had fewer.
        """
        ends, core = self.dims.prelude + self.dims.coda, jnp.arange(self.core)
        before = jnp.take_along_axis(made, jnp.minimum(position, made.shape[1] - 1), axis=1) - times
        e, *kept = self._run("enter", params, z, cache, seen, position)

        def one(i: jax.Array, s: State) -> State:
            now = before + i
            read = jnp.maximum(jnp.minimum(now[..., None], made[:, None] - 1), 0)
            slots = [ends + self.core * n[None] + core.reshape(-1, *(1,) * n.ndim) for n in (now, read)]
            return tuple(self._run("iterate", params, s, e, tuple(slots), seen, position))

        s, *kept = jax.lax.fori_loop(0, times, one, (s, *kept))
        h, *kept = self._run("leave", params, (s, *kept), seen, position)
        return h, s, tuple(kept)

    def hidden_at(self, params: Tree, z: jax.Array, t: jax.Array, cache: Cache, position: jax.Array, seen: jax.Array
                  ) -> tuple[jax.Array, Cache]:
        whole = jnp.full(cache[0].shape[1:3], self.dims.loops)
        start = jnp.zeros((*z.shape, self.width))
        h, _, cache = self.refined(params, z, cache, position, seen, start, whole, self.dims.loops)
        return h, cache

    def empty_cache(self, rows: int, seq_len: int) -> tuple[jax.Array, ...]:
        """(k, v [prelude, coda, R times the core; B, S, heads of keys, dim])."""
        room = jnp.zeros((self.dims.passed(self.blocks), rows, seq_len, *self.sizes[1:3]), self.dtype)
        return room, room
