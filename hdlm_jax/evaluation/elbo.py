"""The exact NELBO of any rows (docs/theory.md section 3, "Variance").

Noise times come from q_a, stratified over all (sequence, draw) pairs; nats and tokens are summed and divided once.
Every pair has its own random numbers, so the result does not depend on batch size or device count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.console import perplexity
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import EvaluateConfig
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.process import NoiseTimes, Process
from hdlm_jax.evaluation.rows import per_text, split_all, to_rows
from hdlm_jax.models.features import given
from hdlm_jax.models.heads import map_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.loading import Run

_FIELDS = ("x", "segment", "score", "features")  # of rows, what the network and the process see


def make_nelbo_step(network: Trunk, process: Process, mesh: Mesh | None = None
                    ) -> Callable[[Tree, Batch, jax.Array], jax.Array]:
    """step(params, batch, key) -> float32 [b, K]: nats of each row at each level, as an estimate w C / q; behind them
    those of every other of process.parts.

    batch: x, segment int32 [b, S], score bool [b, S], tau, inv_q float32 [b], pair int32 [b] (its randomness) and, for
    a network that is given some, features float32 [b, P, F].
    """
    shard = parallel.OverBatch(mesh)

    def step(params: Tree, batch: Batch, key: jax.Array) -> jax.Array:
        x, tau = batch["x"], batch["tau"]
        keys = fold(jnp.broadcast_to(key, tau.shape), batch["pair"])
        z, level = process.with_params(params).noised(keys, x, tau, batch["score"])
        told = given(params, batch.get("features"))
        h = network.hidden(told, z, -jnp.expm1(-tau), batch["segment"], None, x if network.block else None)
        fields = (x, z, jnp.broadcast_to(tau[:, None], x.shape))
        rates = [process.nelbo_weight(z, tau, x) * map_over_noised(
            network.head, lambda p, f, levels, loss=loss: loss(p, f[0], f[1], levels, tau=f[2]),
            network.head_params(params), h, level, x, fields, needs=process.needs(), shard=shard)
            for loss in process.parts]
        by_level = [jnp.where(level == k, rates[0], 0.0) for k in range(1, process.num_levels + 1)]
        return jnp.stack([jnp.sum(a, axis=-1) for a in by_level + rates[1:]], axis=-1) * batch["inv_q"][:, None]

    return step


def stratified_pairs(proposal: NoiseTimes, seed: int, rows: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """tau and q of every pair, float64 [draws, rows]: one stratum of q's CDF a pair, each pass spread over all."""
    rng = np.random.Generator(np.random.Philox(seed))
    place = np.stack([rng.permutation(rows) for _ in range(draws)])
    part = np.stack([rng.permutation(draws) for _ in range(rows)], axis=1)  # of stratum s, which pass gets which
    part = np.take_along_axis(part, place, axis=1)
    return proposal.quantile((place * draws + part + rng.random((draws, rows))) / (rows * draws))


class Evaluator:
    """Compiled once for each size of batch, used for any rows and parameters of the same shapes.

    Args:
      seq_len: tokens of a row; seed: of noise times and noise; batch_size: rows at once, 0: what fills the devices.
      cv2: squared coefficient of variation that the noise times are drawn for (process.proposal).
    """

    def __init__(self, network: Trunk, process: Process, mesh: Mesh, params: Tree, *, seq_len: int, seed: int,
                 cv2: float, batch_size: int = 0) -> None:
        self.process, self.seed = process, seed
        fill = max(1, (8192 if jax.default_backend() == "cpu" else 262_144) // seq_len)  # rows of a device
        self.most_rows = batch_size or parallel.batch_shards(mesh) * fill
        self.proposal = process.proposal(seq_len, cv2)
        self.program = parallel.RowProgram(make_nelbo_step(network, process, mesh), mesh, params)

    def pairs(self, rows: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """tau and q of every pair; see stratified_pairs."""
        return stratified_pairs(self.proposal, self.seed, rows, draws)

    def nats(self, params: Tree, rows: dict[str, np.ndarray], draws: int, name: str = "evaluate"
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates [draws, rows, K] in nats, and the noise times and densities [draws, rows] they were made at.

        Where the process is exact (autoregressive) there is one draw, whatever was asked for.
        """
        n, draws = len(rows["x"]), 1 if self.process.exact else draws
        tau, q = self.pairs(n, draws)
        out = self.at(params, rows, np.tile(np.arange(n), draws), tau.reshape(-1), q.reshape(-1), name=name)
        return out.reshape(draws, n, -1), tau, q

    def at(self, params: Tree, rows: dict[str, np.ndarray], which: np.ndarray, tau: np.ndarray, q: np.ndarray,
           pair: np.ndarray | None = None, name: str = "evaluate") -> np.ndarray:
        """Estimates [n, K] in nats for n pairs of a row and a noise time.

        Args:
          rows: x, segment int32 [rows, S], score bool [rows, S], perhaps features; which: int [n], the pairs' rows.
          tau, q: float [n], noise times and the densities they come from.
          pair: int [n], a pair's random numbers: the same one for common random numbers; None: all different.
        """
        n, pair = len(which), np.arange(len(which)) if pair is None else pair

        def batch(pick: np.ndarray) -> dict[str, np.ndarray]:
            return {field: rows[field][which[pick]] for field in _FIELDS if field in rows} | {
                "tau": tau[pick].astype(np.float32), "inv_q": (1 / q[pick]).astype(np.float32),
                "pair": pair[pick].astype(np.int32)}

        out = np.zeros((n, self.process.num_levels + len(self.process.parts) - 1))
        key = jax.random.key(self.seed)
        for pick, found in self.program(params, n, batch, self.most_rows, key, unit="seq", name=name):
            out[pick] = found
        return out


def evaluator_of(run: Run, settings: EvaluateConfig | None = None, seq_len: int = 0) -> Evaluator:
    """The Evaluator of a run; settings: in place of its own; seq_len: of rows of another width."""
    e = settings or run.config.evaluate
    return Evaluator(run.network, run.process, run.mesh, run.params, seq_len=seq_len or run.config.model.seq_len,
                     seed=e.seed, cv2=e.cv2, batch_size=e.batch_size)


def text_nats(evaluator: Evaluator, run: Run, texts: Sequence[np.ndarray], draws: int, name: str,
              given: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(estimates in nats [draws, n], scored tokens [n]) of n texts of any length, ids each, the run's own evaluator.

    Texts longer than S are scored in pieces that do not see each other; given: of each text, its first tokens that are
    context, seen and not scored. Where the process is exact there is one draw, and a decoder's rows are no longer than
    its texts need, as it sees nothing behind a token.
    """
    width = run.config.model.seq_len
    pieces, owner = split_all(texts, width, given, run.ends)
    if not pieces:
        return np.zeros((draws, len(texts))), np.zeros(len(texts), np.int64)
    if run.process.exact and run.config.model.trunk == "decoder":
        width = parallel.bucket(max(len(ids) for ids, *_ in pieces), width)
    rows = to_rows(pieces, width, run.tokenizer.eot)
    nats = evaluator.nats(run.params, rows, draws, name)[0].sum(-1)
    return per_text(nats, owner, len(texts)), per_text(rows["tokens"], owner, len(texts))


def _beside(rest: np.ndarray, tau: np.ndarray, half: int = 16) -> np.ndarray:
    """What is left of values [draws, rows] when the mean over themselves and the `half` before and behind each in noise
    time is taken off, scaled up to the spread of single values.

    That mean is what strata fix, the rest is chance. Without noise times (an exact process) it is the mean of all.
    """
    order = np.argsort(tau, axis=None, kind="stable")
    n, value = order.size, rest.reshape(-1)[order]
    half = half if np.ptp(tau) > 0 else n
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    sums, count = np.concatenate([[0.0], np.cumsum(value)]), high - low
    out = np.empty(n)
    out[order] = (value - (sums[high] - sums[low]) / count) / np.sqrt(np.maximum(1 - 1 / count, 1e-9))
    return out.reshape(rest.shape)


def residuals(nats: np.ndarray, tokens: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """float [draws, rows]: what estimates [draws, rows, K] add to the error of nats a token, a ratio of sums, beside
    those at like noise times. The error is the root of the sum over rows of the square of the sum over draws."""
    per_pair, total = nats.sum(-1), tokens.sum()
    return _beside(per_pair - per_pair.mean(0).sum() / total * tokens, tau) / (len(nats) * total)


def summarise(nats: np.ndarray, tokens: np.ndarray, tau: np.ndarray, q: np.ndarray) -> dict[str, Any]:
    """Nats per token with standard errors from estimates [draws, rows, K] and tokens [rows].

    se: of the sequences and the noise together, from what is left of the estimates beside those at like noise times,
    summed over a sequence's draws first (they belong together): good from the first draw on, NaN for a single sequence.
    se_time: the part of the noise alone (NaN with a single draw). se_data: the rest, the spread between sequences; all
    of `se` with a single draw. uniform_t_variance: what the variance by noise times would be with t uniform (stratified
    as well), as a multiple of what it is; None where too few draws tell.
    """
    (draws, n, _), total, per_pair = nats.shape, tokens.sum(), nats.sum(-1)
    nelbo = per_pair.mean(0).sum() / total
    rest = residuals(nats, tokens, tau)
    se = math.sqrt(np.sum(rest.sum(0) ** 2)) if n > 1 else math.nan  # one sequence says nothing of others
    se_time = math.sqrt(draws * np.sum(rest.var(0, ddof=1))) if draws > 1 else math.nan
    se_data = math.sqrt(max(se**2 - (se_time**2 if draws > 1 else 0.0), 0.0)) if n > 1 else math.nan
    # v(tau), the variance of the integrand h at a noise time, from neighbours in noise time; a share b of it is the
    # spread between sequences, which says nothing about noise times
    order, h = np.argsort(tau, axis=None), (per_pair * q / np.maximum(tokens, 1)).reshape(-1)
    h, q, tau = h[order], q.reshape(-1)[order], tau.reshape(-1)[order]
    v, b = 0.5 * np.diff(h) ** 2, se_data**2 * n
    here, uniform = (np.mean(v / by) - b if v.size else math.nan for by in (q[1:] ** 2, q[1:] * np.exp(-tau[1:])))
    return {
        "nelbo": nelbo, "se": se, "se_data": se_data, "se_time": se_time,
        "perplexity": perplexity(nelbo), "levels": (nats.mean(0).sum(0) / total).tolist(),
        "uniform_t_variance": uniform / here if min(uniform, here) > 0 else None,
        "cv2": se_data**2 * n / nelbo**2 if nelbo else None,
        "tokens": int(total), "rows": n, "draws": draws,
    }
