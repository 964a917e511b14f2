"""Does the gradient of the bound find clusters? A learned map on joints that are known (docs/findings.md).

    python -m tools.toy_map [--out=docs/runs/toy_map.json]

The joints of tools/toy_calls.py: four positions of four words in two classes. With the optimal network that sees all
other tokens the bound is the entropy for every map K, so there is nothing to find; here the network sees those beside
it alone, and is otherwise optimal: f(x_i) = p(x_i | z_{i-1}, z_{i+1}). Its bound is a sum of conditional entropies,

    sum_i sum_{a,b} u_ab H(x_i | c_i, z_{i-1}, z_{i+1}) + v_ab I(x_i; c_i | z_{i-1}, z_{i+1}),

the neighbours at levels a and b, u and v the chances of that when x_i crosses to its cluster, and that to the mask. K
is trained by its exact gradient from --starts random maps; what is told is the bound in nats a text.

A second table has the estimators of the gradient that a training could use, for a small network: the error of the mean
of each by enumeration of all z of two tokens, relative to the gradient of the bound; and its standard deviation at an
equal number of rows, in units of that at fixed z, for two tokens and (4,000 draws) for 64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hdlm_jax.common.console import markdown
from hdlm_jax.common.jsons import write_json
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.models.soft import SoftProcess
from tools import cli
from tools.toy_calls import HIERARCHIES, JOINTS, V, entropy, joint

N, STEPS, RATE = 2, 2000, 0.05  # clusters; of Adam
CLASSES = (0, 0, 1, 1)  # of the joints' words


# ---- what a map is worth to a network that sees little --------------------------------------------------------------


def chances(chain: LevelChain) -> np.ndarray:
    """[2, 3, 3] that two neighbours are at levels a and b when a token crosses into level 1, 2."""
    u = (np.arange(20_000) + 0.5) / 20_000
    tau = -2 * np.log1p(-u)  # a density that covers both ends
    beta = np.asarray(chain.beta(tau, np), float)
    flow = np.asarray(chain.rates)[None] * beta[:, :2] * (2 / (1 - u))[:, None]
    return np.einsum("tk,ta,tb->kab", flow, beta, beta) / len(u)


def bound(p: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Of log K [V, n_1] the bound of the network that sees its neighbours, nats a text of the joint p."""
    share = chances(LevelChain((1.0, 1.0)))
    near = []  # of each position its law with those beside it: [V, V, V]
    for i in range(p.ndim):
        table = p.sum(tuple(j for j in range(p.ndim) if abs(i - j) > 1))
        near.append(table[None] if i == 0 else table[..., None] if i == p.ndim - 1 else table)

    def xlogx(a: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0)), 0.0))

    def of(log_k: jax.Array) -> jax.Array:
        k, total = jnp.exp(log_k), jnp.float64(0)
        for table in near:
            for a in range(3):
                for b in range(3):
                    shows = [jnp.ones((n, 1)) if n == 1 else (jnp.eye(V), k, jnp.ones((V, 1)))[level]
                             for n, level in zip((table.shape[0], table.shape[2]), (a, b), strict=True)]
                    seen = jnp.einsum("axb,au,bv->xuv", table, *shows)
                    both = jnp.einsum("xuv,xc->xcuv", seen, k)
                    word = xlogx(both.sum(0)) - xlogx(both)
                    cluster = xlogx(both) - xlogx(seen) - xlogx(both.sum(0)) + xlogx(seen.sum(0))
                    total += share[0, a, b] * word + share[1, a, b] * cluster
        return total

    return of


def hard(classes: Sequence[int] | None) -> jax.Array:
    """log K of hard classes; None: one that says nothing."""
    return jnp.log(jnp.asarray(np.full((V, N), 1 / N) if classes is None else np.eye(N)[list(classes)] + 1e-300))


def found(p: np.ndarray, starts: int) -> list[dict]:
    """Where gradient descent ends from random maps: its bound, and K."""
    of, tx = bound(p), optax.adam(RATE)

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
        theta, state = carry
        updates, state = tx.update(jax.grad(lambda t: of(jax.nn.log_softmax(t)))(theta), state)
        return (optax.apply_updates(theta, updates), state), None

    def run(theta: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(jax.lax.scan(step, (theta, tx.init(theta)), None, STEPS)[0][0])

    first = np.random.default_rng(0).standard_normal((starts, V, N))
    ends = jax.jit(jax.vmap(run))(jnp.asarray(first))
    return [{"bound": float(b), "map": np.exp(k).round(4).tolist(), "likeliest": named(k.argmax(-1))}
            for b, k in zip(jax.vmap(of)(ends), np.asarray(ends), strict=True)]


def named(classes: Sequence[int] | np.ndarray) -> str:
    """Classes as digits, the first word's being 0."""
    return "".join(str(int(c != classes[0])) for c in classes)


def record(name: str, starts: int) -> dict:
    """Of a joint: its entropy, the bound of some maps, and where gradient descent ends."""
    p = joint(name)
    of = jax.jit(bound(p))
    fixed = {kind: float(of(hard(classes))) for kind, classes in HIERARCHIES.items()}
    pairs = {named(at): float(of(hard(at))) for at in np.ndindex((2,) * V) if at[0] == 0 and sum(at)}
    return {"joint": name, "entropy": entropy(p), **fixed, "hard": pairs, "found": found(p, starts)}


# ---- what a gradient costs -------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Two draws of a text at the same levels, row by row: states z and other int [M, S], rates of their costs over the
    density of the noise time [M, S], and the chances of the rows [M]."""

    z: np.ndarray
    other: np.ndarray
    rates: np.ndarray
    chance: np.ndarray


def draws(process: SoftProcess, k: np.ndarray, x: np.ndarray, rows: int = 0, seed: int = 0) -> Drawn:
    """All draws of a text x [S] at 100 noise times; or so many, at random."""
    rng, many = np.random.default_rng(seed), rows or 100
    u = rng.random(many) if rows else (np.arange(many) + 0.5) / many
    tau, density = -2 * np.log1p(-u), (1 - u) / 2
    beta, weight = (np.asarray(a, float) for a in (process.chain.beta(tau, np), process.chain.weight(tau, np)))
    weight = np.concatenate([np.zeros((many, 1)), weight], 1) / density[:, None]
    options = np.array([(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 0)])  # level, cluster, other one
    at, first, second = options.T
    likely = beta[:, None, at] * np.where(at == 1, k[x][:, first] * k[x][:, second], 1.0)[None]  # [times, S, options]
    if rows:
        pick, time = np.argmax(np.log(likely) + rng.gumbel(size=likely.shape), -1), np.arange(many)
        chance = np.full(many, 1 / many)
    else:
        each = np.array(list(np.ndindex((len(options),) * len(x))))
        pick, time = np.tile(each, (many, 1)), np.repeat(np.arange(many), len(each))
        chance = np.prod(likely[time[:, None], np.arange(len(x))[None], pick], 1) / many

    def states(cluster: np.ndarray) -> np.ndarray:
        return np.where(at[pick] == 0, x[None], np.where(at[pick] == 1, V + cluster[pick], process.mask_id))

    return Drawn(states(first), states(second), weight[time[:, None], at[pick]], chance)


def estimators(length: int, rows: int = 0, seed: int = 0) -> dict[str, tuple[np.ndarray, float]]:
    """Mean [V, n_1] and standard deviation of each estimator of the gradient, for a text and a small network."""
    rng = np.random.default_rng(seed)
    process = SoftProcess(Hierarchy.from_parents([[0, 1, 0, 1]]), LevelChain((1.0, 1.0)), 0.9)
    states, x = process.num_states, rng.integers(0, V, length)
    embed = jnp.asarray(2 / np.sqrt(length) * rng.standard_normal((length, states, 6)))
    out, theta = jnp.asarray(1.5 * rng.standard_normal((length, 6, V))), jnp.asarray(rng.standard_normal((V, N)))
    rows_of = draws(process, np.exp(np.asarray(jax.nn.log_softmax(theta))), x, rows, seed)

    def values(z: jax.Array, rates: jax.Array) -> tuple[jax.Array, ...]:
        """Of a row: its cost, the gradient at fixed z, the same straight through, that of log q(z)."""
        def bound(theta: jax.Array) -> SoftProcess:
            return dataclasses.replace(process, log_k=jax.nn.log_softmax(theta))

        def nats(theta: jax.Array, straight: bool) -> jax.Array:
            shows = jax.nn.one_hot(z, states, dtype=theta.dtype)
            if straight:  # what is shown, with the gradient of its law
                law = jnp.zeros((length, states)).at[:, V : V + N].set(jnp.exp(jax.nn.log_softmax(theta))[x])
                law = jnp.where((process.level_of(z) == 1)[:, None], law, 0.0)
                shows = shows + law - jax.lax.stop_gradient(law)
            h = jnp.tanh(jnp.einsum("is,isd->d", shows, embed))
            return jnp.sum(rates * bound(theta).token_loss(jnp.einsum("d,idv->iv", h, out), jnp.asarray(x), z))

        log_q = lambda theta: bound(theta).log_drawn(jnp.asarray(x), z).sum()  # noqa: E731
        cost, fixed = jax.value_and_grad(nats)(theta, False)
        return cost, fixed, jax.grad(nats)(theta, True), jax.grad(log_q)(theta)

    of = jax.jit(jax.vmap(values))
    (cost, fixed, straight, q), (other, fixed2, _, q2) = (
        [np.asarray(a) for a in of(jnp.asarray(z), jnp.asarray(rows_of.rates))] for z in (rows_of.z, rows_of.other))
    ahead = (cost - other)[:, None, None]
    found = {"fixed z": fixed, "straight through": straight, "score": fixed + cost[:, None, None] * q,
             "score, pairs": (fixed + fixed2 + ahead * (q - q2)) / 2}
    told = {}
    for name, each in found.items():
        mean = np.einsum("m,m...->...", rows_of.chance, each)
        told[name] = mean, float(np.sqrt(np.einsum("m,mvn->", rows_of.chance, (each - mean[None]) ** 2)))
    return told


def costs() -> list[dict]:
    """Each estimator's relative error by enumeration of two tokens, and its spread at equal rows of two tokens and of
    64, in units of that at fixed z."""
    few, many = estimators(2), estimators(64, rows=4000)
    exact = few["score"][0]
    scale = {name: 2**0.5 if "pairs" in name else 1.0 for name in few}  # two rows a text
    return [{"estimator": name, "bias": float(np.linalg.norm(few[name][0] - exact) / np.linalg.norm(exact)),
             **{f"spread_{n}": scale[name] * told[name][1] / told["fixed z"][1] for n, told in ((2, few), (64, many))}}
            for name in few]


def tables(result: dict) -> str:
    """Markdown of both."""
    rows = [[r["joint"], *(f"{r[name]:.4f}" for name in ("entropy", *HIERARCHIES)), f"{min(r['hard'].values()):.4f}",
             f"{min(one['bound'] for one in r['found']):.4f}", f"{max(one['bound'] for one in r['found']):.4f}",
             f"{sum(one['likeliest'] == named(CLASSES) for one in r['found'])} of {len(r['found'])}"]
            for r in result["joints"]]
    each = [[r["estimator"], f"{r['bias']:.3f}", f"{r['spread_2']:.1f}", f"{r['spread_64']:.1f}"]
            for r in result["estimators"]]
    return (markdown(["joint", "entropy", *HIERARCHIES, "best hard map", "learned, best", "learned, worst",
                      "found the classes"], rows)
            + "\n\n" + markdown(["gradient by", "error of its mean", "spread, 2 tokens", "spread, 64 tokens"], each))


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("toy_map"):
        ask = cli.Parser("toy_map", __doc__)
        ask.add_argument("--out", type=Path, default=Path("docs/runs/toy_map.json"))
        ask.add_argument("--starts", type=cli.at_least(1), default=16, help="random maps to learn from")
        given = ask.parse_args(argv)
        with jax.enable_x64(True):
            result = {"joints": [record(name, given.starts) for name in JOINTS], "estimators": costs()}
        write_json(given.out, result)
        print(tables(result))


if __name__ == "__main__":
    main()
