"""The diagonal sampler of looped networks (arXiv 2510.14961): a front of positions whose states are refined together.

Every call refines the latent states of the front `inner` iterations, guesses their tokens anew and begins one more
position behind the guess of the last. A position stands when those before it do and its state has come to rest, or has
had all R iterations. A front of one position without noise writes the text of `diffusion.autoregressive.sample`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.config.rules import rule
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.draws import Number, draw_from, fold, row_keys, token_keys
from hdlm_jax.diffusion.prediction import TripCount
from hdlm_jax.diffusion.trajectory import Trajectory
from hdlm_jax.models.looped import START, LoopedDecoder
from hdlm_jax.models.trunk import Cache, Trunk


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """inner: iterations of a call; wavefront: positions at most that are refined at once."""

    inner: int = 4
    wavefront: int = 128

    def check(self, network: Trunk, params: Tree) -> None:
        """ConfigError unless these are a network that loops and its parameters, R iterations being whole calls."""
        rule("adapter" in params, "generate.method", "diagonal", "refines the latent states of a network of "
             "decoder.loops; choose another")
        loops = cast(LoopedDecoder, network).dims.loops
        rule(loops % self.inner == 0, "generate.options", f"inner={self.inner}", f"must divide decoder.loops={loops}")


class Front(NamedTuple):
    """What a call changes, of every row.

    z: int32 [B, S], tokens that stand and, in the front, guesses; sure: float32 [B, S], their probabilities; s: float32
    [B, S, D], latent states; made: int32 [B, S], iterations that they have had; first, end: int32 [B], the positions
    of the front; had: int32 [B], calls.
    """

    z: jax.Array
    sure: jax.Array
    s: jax.Array
    made: jax.Array
    first: jax.Array
    end: jax.Array
    had: jax.Array
    cache: Cache
    film: tuple[jax.Array, ...]


def sample(key: jax.Array, network: LoopedDecoder, params: Tree, process: AutoregressiveProcess, z: jax.Array,
           by: Diagonal, *, exit: Number = 0.0, noise: Number = 0.0, temperature: Number = 1.0, top_p: Number = 1.0,
           length: Number | None = None, sync_trip_count: TripCount = lambda n: n, frames: int = 0
           ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z with given tokens in front and masks behind.

    Args:
      exit: a position has come to rest when a call moves its state by less than this share of the state's norm (and the
        token that it was shown still stands); 0: never.
      noise: this share / (1 + n) of a state that has had n iterations is replaced by noise as training starts from.
      length: int32 [B] or a scalar, positions to fill; the rest is as of diffusion.autoregressive.sample, whose random
        numbers these are: a position's draws are the same in all calls.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample. A call passes prelude, `inner` times the core, and coda.
    """
    (b, s), mask, canvas = z.shape, process.hierarchy.mask_id, z
    keys, loops, row = row_keys(key, b), network.dims.loops, jnp.arange(b)[:, None]
    each, head = token_keys(keys, z.shape), network.head_params(params)
    length = jnp.broadcast_to(jnp.asarray(s if length is None else length, jnp.int32), (b,))
    length = jnp.where(jnp.any(z == mask, axis=1), length, 0)
    column, record = jnp.arange(min(by.wavefront, s))[None], Trajectory(frames, jnp.max(length) * (loops // by.inner))

    def step(f: Front) -> Front:
        busy = f.first < length
        end = jnp.minimum(jnp.minimum(f.end + 1, f.first + column.size), length)
        at = f.first[:, None] + column
        place, near = jnp.where(at < end[:, None], at, s), jnp.minimum(at, s - 1)
        old, n = f.s[row, near], f.made[row, near]
        share = (noise / (1 + n))[..., None]
        of_call = fold(fold(each[row, near], 1), n).reshape(-1)
        fresh = jax.vmap(lambda key: jax.random.normal(key, old.shape[-1:]))(of_call).reshape(old.shape)
        made = f.made.at[row, place].add(by.inner, mode="drop")
        h, new, cache = network.refined(params, process.shifted(f.z)[row, near], f.cache, place,
                                        jnp.arange(s)[None, None] <= at[..., None],
                                        (1 - share) * old + share * START * fresh, made, by.inner)
        p = process.as_prediction(network.head.predict(head, h))
        drawn = draw_from(each[row, near], p.logits, temperature, top_p)
        free = canvas[row, near] == mask
        token = jnp.where(free, drawn, canvas[row, near])
        moved = jnp.linalg.norm(new - old, axis=-1) / jnp.linalg.norm(new, axis=-1)
        stays = jnp.pad(token == f.z[row, near], ((0, 0), (1, 0)), constant_values=True)[:, :-1]
        rests = (place < s) & (stays & (moved < exit) | (made[row, near] >= loops))
        first = f.first + jnp.sum(jnp.cumprod(rests, axis=1), axis=1)
        tokens, sure = (a.at[row, place].set(now, mode="drop") for a, now in (
            (f.z, token), (f.sure, jnp.where(free, jnp.exp(p.log_prob(drawn)), 0.0))))
        had = f.had + busy
        film = record.expose(f.film, had - 1, (tokens, sure, 1 - first / jnp.maximum(length, 1)))
        return Front(tokens, sure, f.s.at[row, place].set(new, mode="drop"), made, first, end, had, cache, film)

    def anyone(f: Front) -> jax.Array:
        return sync_trip_count(jnp.any(f.first < length).astype(jnp.int32))

    def body(carry: tuple[Front, jax.Array]) -> tuple[Front, jax.Array]:
        f = step(carry[0])
        return f, anyone(f)

    none, sure = jnp.zeros(b, jnp.int32), jnp.zeros(z.shape, jnp.float32)
    f = Front(z, sure, jnp.zeros((*z.shape, network.width)), jnp.zeros(z.shape, jnp.int32), none, none, none,
              network.empty_cache(b, s), record.start((z, sure, jnp.ones(b))))
    f, _ = jax.lax.while_loop(lambda carry: carry[1] > 0, body, (f, anyone(f)))
    return f.z, {"calls": jnp.max(f.had), "row_forwards": f.had} | record.stats(f.film, f.had)
