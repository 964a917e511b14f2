"""A continuous channel on a joint that is known: its bound in two parts, and what is written (docs/continuous.md).

    python -m tools.toy_channel [--out=docs/runs/toy_channel.json]

Two words of four, embeddings in three dimensions, the Bayes-optimal network, which reads the other word's symbol and
observation. First table: the bound for MDLM and two clusters, by --rows draws with the process's own noise times, and
its error with those of the symbols alone. Second table: distance of samples from the joint, in total variation, when
the observation moves by a drawn word's embedding (what the library does) and by the mean embedding ("predict x0"); and
that of as many exact draws. Third: other times of the channel (diffusion.channel_times). Fourth: MDLM on a ladder, one
fall or jump a call, jumps by a drawn word and by the mean; masks fall last. Trained runs are cells of tools/grid.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.console import markdown, measured
from hdlm_jax.common.jsons import write_json
from hdlm_jax.decoding import channel as decoding
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain, Proposal
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.evaluation.elbo import stratified_pairs
from hdlm_jax.models import channel
from hdlm_jax.models.channel import ChannelProcess, Observed, State
from hdlm_jax.models.channel_times import TIMES, SignalFirst, TokenTimes
from tools import cli

V, D = 4, 3
PARENTS: dict[str, list[list[int]]] = {"MDLM": [], "2 clusters": [[0, 0, 1, 1]]}
SCALES, STEPS = (0.3, 3.0), (1, 2, 4, 8, 16, 32, 64)
LADDERS, LAST = ((4.0, 0.7), (8.0,), (16.0, 8.0, 4.0, 2.0, 1.0, 0.5)), 100.0  # so fast a mask is the last to fall
TIMES_SHOWN: tuple[tuple[str, type[ChannelProcess], float, tuple[float, ...]], ...] = (
    ("MDLM", TokenTimes, 1.0, (4.0, 0.7)), ("2 clusters", TokenTimes, 1.0, (4.0, 0.7)),
    ("MDLM", SignalFirst, 1.0, (4.0,)), ("2 clusters", SignalFirst, 1.0, (4.0,)), ("MDLM", SignalFirst, 1.0, ()))
Denoise: TypeAlias = Callable[[State, jax.Array], Observed]


def table_of(width: int, seed: int = 0) -> np.ndarray:
    """e float32 [V, D]: mean 0, RMS 1."""
    e = np.random.default_rng(seed).normal(size=(V, width))
    e -= e.mean(0)
    return (e / np.sqrt(np.mean(e**2))).astype(np.float32)


def made(parents: Sequence[Sequence[int]], c: float, width: int = D, rates: Sequence[float] = (), xi: float = 1.0,
         of: type[ChannelProcess] = ChannelProcess, levels: tuple[float, ...] = ()) -> ChannelProcess:
    """The process of V words over these maps."""
    hierarchy = Hierarchy.from_parents(list(parents), V)
    chain = LevelChain(tuple(rates) or (1.0,) * hierarchy.num_levels)
    return of(hierarchy, chain, xi, "cavity", c, width, jnp.asarray(table_of(width)), levels)


class MeanJumps(TokenTimes):
    """A ladder whose jumps are drawn, and priced, by the mean embedding ("predict x0")."""

    def cost(self, p: Prediction, signal: jax.Array, x: jax.Array, z: State) -> jax.Array:
        return self._next(z.s)[1] * channel.mean_error(p, signal, x)


def ladder(levels: tuple[float, ...], of: type[TokenTimes] = TokenTimes, rate: float = LAST) -> TokenTimes:
    """MDLM's words on a ladder of ratios, c = 1. rate: of the masks, beside the clock's 1."""
    return cast(TokenTimes, made([], 1.0, rates=(rate,), of=of, levels=levels))


def shown(process: ChannelProcess) -> np.ndarray:
    """[V, N] log of the chance that a word shows each state, given its level."""
    h, parts = process.hierarchy, [np.eye(V)]
    first = np.where(np.arange(h.sizes[1]) == np.asarray(h.anc[1])[:, None], process.xi, process.leak)
    for level in range(1, h.num_levels + 1):
        parts.append(first @ np.eye(h.sizes[level])[process.ancestors(1, level)])
    with np.errstate(divide="ignore"):
        return np.log(np.concatenate(parts, axis=1))


def bayes(process: ChannelProcess, joint: np.ndarray) -> Denoise:
    """(State [B, S], t) -> the optimal prediction, own evidence and all, of a joint law [V] * S of words."""
    of_states, length = jnp.asarray(shown(process).T, jnp.float32), joint.ndim
    log_joint = jnp.log(jnp.asarray(joint, jnp.float32))[None]

    def denoise(state: State, t: jax.Array) -> Observed:
        told: Any = channel.evidence(state.u, state.s, jnp.asarray(process.signal))
        of_words = jnp.where((state.z < V)[..., None], 0.0, told) + of_states[state.z]  # [B, S, V]
        logits = []
        for i in range(length):
            post = jnp.broadcast_to(log_joint, (len(told), *joint.shape))
            for j in range(length):
                if j != i:
                    post += of_words[:, j].reshape(len(told), *(V if k == j else 1 for k in range(length)))
            others = tuple(1 + j for j in range(length) if j != i)
            logits.append(jax.nn.logsumexp(post, axis=others) + told[:, i])
        return Observed(jnp.stack(logits, axis=1), process.hierarchy, jnp.asarray(process.signal))

    return denoise


def bound(process: ChannelProcess, joint: np.ndarray, rows: int, own: bool = True, seed: int = 0
          ) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors [3] of (discrete, continuous, sum) in nats a text, one draw for each of `rows` texts,
    which have the joint's shares.

    own: by the process's own noise times, else by those of its symbols.
    """
    rng, denoise = np.random.default_rng(seed), bayes(process, joint)
    which = np.searchsorted(np.cumsum(joint.ravel())[:-1], rng.permutation((np.arange(rows) + 0.5) / rows))
    x = np.stack(np.unravel_index(which, joint.shape), axis=1)
    proposal = process.proposal(joint.ndim, 0.03) if own else Proposal(process.chain, joint.ndim, 0.03)
    tau, q = stratified_pairs(proposal, seed, rows, 1)

    @jax.jit
    def rates(x: jax.Array, tau: jax.Array, key: jax.Array) -> jax.Array:
        state, level = process.noised(key, x, tau, jnp.ones(x.shape, bool))
        p, weight = denoise(state, tau), process.nelbo_weight(state, tau)
        each = [jnp.where(level > 0, weight * part(p, x, state, tau=tau), 0.0) for part in process.parts]
        return jnp.stack([jnp.sum(nats, axis=-1) for nats in each])

    times = jnp.asarray(tau[0], jnp.float32)
    parts = np.asarray(rates(jnp.asarray(x, jnp.int32), times, jax.random.key(seed)), float) / q
    parts = np.concatenate([parts, parts.sum(0, keepdims=True)])
    return parts.mean(1), parts.std(1) / math.sqrt(rows)


def twin(process: ChannelProcess, joint: np.ndarray, steps: int, rows: int, mean: bool, seed: int = 0) -> np.ndarray:
    """Words [rows, S] of MDLM's way back in plain steps; mean: the observation moves by the mean of e, not by e(w)."""
    rng, e, shape = np.random.default_rng(seed), np.asarray(process.signal, float), (rows, joint.ndim)
    log_probs = jax.jit(lambda state: bayes(process, joint)(state, jnp.zeros(rows)).log_probs())
    u, s, words = np.zeros((*shape, e.shape[1])), 0.0, np.full(shape, V)
    for call in range(steps):
        state = State(*(jnp.asarray(a) for a in (words.astype(np.int32), u.astype(np.float32),
                                                 np.full(shape, s, np.float32))))
        p = np.exp(np.asarray(log_probs(state), float))
        w = np.minimum((p.cumsum(-1) < rng.random((*shape, 1))).sum(-1), V - 1)
        falls = (words == V) & (rng.random(shape) < 1 / (steps - call))
        words = np.where(falls, w, words)
        then = float(process.ratio(-np.log(np.float64(call + 1) / steps), np))
        u += (then - s) * (p @ e if mean else e[w]) + np.sqrt(then - s) * rng.normal(size=u.shape)
        s = then
    return words


def climbed(process: TokenTimes, joint: np.ndarray, rows: int, mean: bool, seed: int = 0) -> np.ndarray:
    """Words [rows, S] of MDLM's way back on a ladder, one fall or jump a call, in plain steps; mean: as of `twin`."""
    rng, e, m = np.random.default_rng(seed), np.asarray(process.signal, float), len(process.levels)
    log_probs = jax.jit(lambda state: bayes(process, joint)(state, jnp.zeros(rows)).log_probs())
    shape, row = (rows, joint.ndim), np.arange(rows)
    u, s, words = np.zeros((*shape, e.shape[1])), np.zeros(shape), np.full(shape, V)
    falls = rng.exponential(1 / process.chain.rates[0], (*shape, 1))
    times = np.concatenate([falls, rng.exponential(1.0, (*shape, m)).cumsum(-1)], axis=-1).reshape(rows, -1)
    for event in np.argsort(-times, axis=1).T:
        i, level = np.divmod(event, m + 1)  # 0: the mask falls
        state = State(*(jnp.asarray(a) for a in (words.astype(np.int32), u.astype(np.float32), s.astype(np.float32))))
        p = np.exp(np.asarray(log_probs(state), float))[row, i]
        w = np.minimum((p.cumsum(-1) < rng.random((rows, 1))).sum(-1), V - 1)
        words[row, i] = np.where((level == 0) & (words[row, i] == V), w, words[row, i])
        s[row, i] = np.where(level > 0, process.heights[level - 1], s[row, i])
        d = np.where(level > 0, process.heights[level - 1] - process.heights[level], 0.0)[:, None]
        u[row, i] += d * (p @ e if mean else e[w]) + np.sqrt(d) * rng.normal(size=(rows, e.shape[1]))
    return words


def written(process: ChannelProcess, joint: np.ndarray, steps: int, rows: int, seed: int = 0, singly: bool = False
            ) -> np.ndarray:
    """Words [rows, S] of the library's sampler."""
    run = jax.jit(lambda key, z: decoding.sample(key, bayes(process, joint), process, z, steps=steps, tokens=8192,
                                                 singly=singly))
    return np.asarray(run(jax.random.key(seed), jnp.full((rows, joint.ndim), process.mask_id, jnp.int32))[0])


def distance(words: np.ndarray, joint: np.ndarray) -> float:
    """Total variation between what was written and the joint."""
    counts = np.bincount(np.ravel_multi_index(list(words.T), joint.shape), minlength=joint.size)
    return float(0.5 * np.abs(counts / len(words) - joint.ravel()).sum())


def bounds_of(joint: np.ndarray, rows: int) -> list[dict[str, Any]]:
    """The first table."""
    bounds = []
    for name, parents in PARENTS.items():
        for c in SCALES:
            (discrete, continuous, both), (_, _, se) = bound(made(parents, c), joint, rows)
            plain = bound(made(parents, c), joint, rows, own=False)[1][2]
            bounds.append({"chain": name, "c": c, "discrete": discrete, "continuous": continuous, "sum": both, "se": se,
                           "se_symbols": plain})
    return bounds


def times_of(joint: np.ndarray, rows: int) -> list[dict[str, Any]]:
    """The third table: token times and the signal first."""
    found = []
    for name, of, c, levels in TIMES_SHOWN:
        (discrete, continuous, both), (_, _, se) = bound(made(PARENTS[name], c, of=of, levels=levels), joint, rows)
        told = {"chain": name, "times": next(times for times, kind in TIMES.items() if kind is of), "c": c}
        parts = {"discrete": discrete, "continuous": continuous, "sum": both, "se": se}
        found.append(told | {"levels": list(levels)} | parts)
    return found


def ladders_of(joint: np.ndarray, rows: int, draws: int) -> list[dict[str, Any]]:
    """The fourth table: jumps by the mixture and by the mean, where words are named last."""
    found = []
    for levels in LADDERS:
        one: dict[str, Any] = {"levels": list(levels)}
        for name, of in (("drawn", TokenTimes), ("mean", MeanJumps)):
            mean, se = bound(ladder(levels, of), joint, rows)
            one |= {f"{name}_sum": mean[2], f"{name}_se": se[2]}
        one["drawn_tv"] = distance(written(ladder(levels), joint, 0, draws, singly=True), joint)
        one["mean_tv"] = distance(climbed(ladder(levels), joint, draws, mean=True), joint)
        found.append(one)
    return found


def record(rows: int, draws: int) -> dict[str, Any]:
    """All of it on the joint."""
    joint = np.random.default_rng(0).dirichlet(np.full(V * V, 0.5)).reshape(V, V)
    process, prior = made([], 3.0), joint.sum(1)
    laws = []
    for steps in STEPS:
        found: dict[str, Any] = {"steps": steps}
        for words, law in ((1, prior), (2, joint)):
            found[f"drawn_{words}"] = distance(written(process, law, steps, draws), law)
            found[f"mean_{words}"] = distance(twin(process, law, steps, draws, mean=True), law)
        laws.append(found)
    rng = np.random.default_rng(1)
    exact = {words: distance(np.stack(np.unravel_index(rng.choice(law.size, draws, p=law.ravel()), law.shape), axis=1),
                             law) for words, law in ((1, prior), (2, joint))}
    return {"entropy": float(-(joint * np.log(joint)).sum()), "rows": rows, "draws": draws,
            "bounds": bounds_of(joint, rows), "laws": laws, "exact": [exact[1], exact[2]],
            "times": times_of(joint, rows), "ladders": ladders_of(joint, rows, draws)}


def _levels(row: dict[str, Any]) -> str:
    return ", ".join(f"{level:g}" for level in row["levels"])


def tables(result: dict[str, Any]) -> str:
    """Markdown of all of them."""
    rows = [[r["chain"], f"{r['c']:g}", f"{r['discrete']:.3f}", f"{r['continuous']:.3f}",
             measured(r["sum"], r["se"], ".3f"), f"{r['se_symbols']:.4f}"] for r in result["bounds"]]
    names = [f"{what}_{words}" for words in (1, 2) for what in ("drawn", "mean")]
    laws = [[str(r["steps"]), *(f"{r[name]:.4f}" for name in names)] for r in result["laws"]]
    one, two = result["exact"]
    laws.append(["exact draws", f"{one:.4f}", "", f"{two:.4f}", ""])
    found = [markdown(["process", "c", "discrete", "continuous", f"sum (entropy {result['entropy']:.4f})",
                       "error by the symbols' noise times"], rows),
             markdown(["steps", "one word, drawn", "one word, mean", "two words, drawn", "two words, mean"], laws)]
    if "times" in result:
        found += [markdown(["process", "times", "c", "levels", "discrete", "continuous", "sum"], [
            [r["chain"], r["times"], f"{r['c']:g}", _levels(r), f"{r['discrete']:.3f}", f"{r['continuous']:.3f}",
             measured(r["sum"], r["se"], ".3f")] for r in result["times"]]),
                  markdown(["s of the ladder", "NELBO, drawn", "NELBO, mean", "TV, drawn", "TV, mean"], [
            [_levels(r) + ", 0", *(measured(r[f"{name}_sum"], r[f"{name}_se"], ".3f") for name in ("drawn", "mean")),
             f"{r['drawn_tv']:.4f}", f"{r['mean_tv']:.4f}"] for r in result["ladders"]])]
    return "\n\n".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("toy_channel"):
        ask = cli.Parser("toy_channel", __doc__)
        ask.add_argument("--out", type=Path, default=Path("docs/runs/toy_channel.json"))
        ask.add_argument("--rows", type=cli.at_least(2), default=400_000, help="draws of the bound")
        ask.add_argument("--draws", type=cli.at_least(1), default=100_000, help="samples")
        given = ask.parse_args(argv)
        result = record(given.rows, given.draws)
        write_json(given.out, result)
        print(tables(result))


if __name__ == "__main__":
    main()
