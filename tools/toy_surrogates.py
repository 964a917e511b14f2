"""How far are the surrogates of policy gradients from the gradient itself? By enumeration (docs/training.md).

    python -m tools.toy_surrogates [--out=docs/runs/toy_surrogates.json]

Three tokens of three words, MDLM, every rollout of `max_prob` in two or three calls and of a random order, one token a
call; a network is a table of logits, one for every state, so that nothing is approximated. Each surrogate's gradient is
its mean over all rollouts and all masks, its advantage the reward less its mean. Rewards are uniform in [0, 1] for each
text, --tables networks of each kind: logits of standard deviation .3, 1 and 2, and the conditionals of a random joint
(`consistent`). Told are

  cosine    of the angle to the gradient of the mean reward: the mean over networks, and in brackets the worst
  constant  the length of what a constant reward of 1 gives, over that of the gradient: 0 if it is one

Rows: score (tuning/update.py), also where what was drawn at a temperature of .7 is scored at 1, and as a mean over the
tokens of a call (CJ-GRPO); elbo, nodes (N = 1 node, one too few for three tokens), coupled, one_pass, spg.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.console import markdown
from hdlm_jax.common.jsons import write_json
from hdlm_jax.tuning.update import SHARE, UPPER
from tools import cli

V, S, MASK = 3, 3, 3
PLACE = (V + 1) ** np.arange(S)[::-1]  # of a state of a row in a table
TEXTS = np.array(list(itertools.product(range(V), repeat=S)))  # [27, S]
HIDDEN = np.array(list(itertools.product((False, True), repeat=S)))  # [8, S], which tokens are masked
MANY = HIDDEN.sum(1)
SHOWN = np.where(HIDDEN[None], MASK, TEXTS[:, None]) @ PLACE  # [27, 8], where a text so masked stands in a table
KINDS = ("sd .3", "sd 1", "sd 2", "consistent")
SAMPLERS = {"max_prob, 2 calls": 2, "max_prob, 3 calls": 3, "random order": 3}  # calls
SURROGATES = ("elbo", "nodes", "coupled", "one_pass", "spg")
NODES, SHARES = ((a + b) / 2 for a, b in zip(np.polynomial.legendre.leggauss(16), (1, 0), strict=True))  # in (0, 1)


def network(kind: str, seed: int) -> np.ndarray:
    """Logits [4 ** S, S, V] of every state."""
    rng = np.random.default_rng(seed)
    if kind != "consistent":
        return rng.normal(0, float(kind.removeprefix("sd ")), ((V + 1) ** S, S, V))
    p, table = rng.dirichlet(np.full(len(TEXTS), 0.5)), np.zeros(((V + 1) ** S, S, V))
    for n, places in enumerate(SHOWN):
        for at in places:
            table[at, np.arange(S), TEXTS[n]] += p[n]
    return np.log(np.maximum(table, 1e-12))


class Rollouts(NamedTuple):
    """All of a sampler, n of them: texts [n, S]; where in a table the state stood in which each token was drawn, and
    the call, [n, S]; the probability of the order, [n]."""

    texts: np.ndarray
    places: np.ndarray
    calls: np.ndarray
    share: np.ndarray


def rollouts(table: np.ndarray, sampler: str) -> Rollouts:
    """All rollouts of one of SAMPLERS."""
    logits, calls, out = np.asarray(jax.nn.log_softmax(jnp.asarray(table), axis=-1)), SAMPLERS[sampler], []

    def walk(z: tuple[int, ...], places: list[int], fell: list[int], call: int, share: float) -> None:
        left = [i for i in range(S) if z[i] == MASK]
        if not left:
            out.append((z, places, fell, share))
            return
        at, many, free = int(np.dot(z, PLACE)), -(-len(left) // (calls - call)), sampler == "random order"
        best = sorted(left, key=lambda i: (-float(logits[at, i].max()), i))[:many]
        for some in [[i] for i in left] if free else [best]:
            for words in itertools.product(range(V), repeat=len(some)):
                new = dict(zip(some, words, strict=True))
                then = [call if i in new else c for i, c in enumerate(fell)]
                at_ = [at if i in new else place for i, place in enumerate(places)]
                walk(tuple(new.get(i, s) for i, s in enumerate(z)), at_, then, call + 1,
                     share / len(left) if free else share)

    walk((MASK,) * S, [0] * S, [0] * S, 0, 1.0)
    return Rollouts(*map(np.array, zip(*out, strict=True)))


def weights(name: str, nats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean weights of -log p of each token under each masking, [27, 8, S], of texts to write more often and of those to
    avoid. nats: -log p itself, [27, 8, S]."""
    def plain(of_many: Sequence[float]) -> np.ndarray:  # of the number of masks
        return np.broadcast_to(np.where(HIDDEN, np.asarray(of_many)[MANY][:, None], 0.0), nats.shape)

    k = np.arange(1, S + 1)
    bound = plain([0, *(math.gamma(n) * math.gamma(S - n + 1) / math.gamma(S + 1) for n in k)])
    if name == "elbo":
        return bound, bound
    if name == "spg":
        t = np.repeat(NODES, len(HIDDEN))  # one draw: a time and what it masks
        masks, which = np.tile(HIDDEN, (len(NODES), 1)), np.tile(np.arange(len(HIDDEN)), len(NODES))
        often = np.repeat(SHARES, len(HIDDEN)) * t**masks.sum(1) * (1 - t) ** (S - masks.sum(1))
        w = np.where(masks, 1 / t[:, None], 0.0) * np.exp(-UPPER * nats[:, which])  # [27, draws, S]
        both = w[:, :, None] + w[:, None]
        share = 2 * np.einsum("a,b,xabi->xai", often, often, w[:, :, None] / np.where(both > 0, both, 1.0))
        upper = np.stack([share[:, which == n].sum(1) for n in range(len(HIDDEN))], axis=1)
        return bound, SHARE * upper + (1 - SHARE) * bound
    if name == "one_pass":
        found = plain([0] * S + [1])
    elif name == "nodes":
        found = plain([0, *(0.5 ** (n - 1) * 0.5 ** (S - n) for n in k)])
    else:  # coupled: all masked, and t in (.2, .8) and what it leaves, which are alike
        t = 0.2 + 0.6 * NODES
        found = plain([0, *(np.sum(SHARES * t ** (n - 1) * (1 - t) ** (S - n)) for n in k[:-1]),
                       0.5 + np.sum(SHARES * t ** (S - 1))])
    return found, found


def gradients(table: np.ndarray, reward: np.ndarray, sampler: str, constant: bool = False) -> dict[str, np.ndarray]:
    """Of the mean reward ("gradient") and its surrogates, by name, [4 ** S, S, V]; of texts' rewards [V] * S.

    constant: every advantage is 1.
    """
    texts, places, fell, share = rollouts(table, sampler)

    def log_p(table: jax.Array, temperature: float = 1.0) -> jax.Array:  # of each draw, [n, S]
        return jax.nn.log_softmax(table / temperature, axis=-1)[places, np.arange(S), texts]

    def worth_of(table: jax.Array, temperature: float) -> jax.Array:  # the mean reward
        return jnp.sum(share * jnp.exp(log_p(table, temperature).sum(1)) * reward[tuple(texts.T)])

    start = jnp.asarray(table)
    prob = {t: share * np.exp(np.asarray(log_p(start, t)).sum(1)) for t in (1.0, 0.7)}
    worth = {t: reward[tuple(texts.T)] - prob[t] @ reward[tuple(texts.T)] for t in prob}
    advantage = {t: np.ones_like(worth[t]) if constant else worth[t] for t in prob}
    same_call = (fell[:, :, None] == fell[:, None]).sum(2)
    scored = {"score": (1.0, 1.0, 1.0), "score, drawn at .7, scored at 1": (0.7, 1.0, 1.0),
              "score, mean of a call": (1.0, 1.0, 1 / same_call)}
    out = {name: np.asarray(jax.grad(lambda table: jnp.sum(
        (prob[drawn] * advantage[drawn])[:, None] * part * log_p(table, at_t)))(start))  # noqa: B023
        for name, (drawn, at_t, part) in scored.items()}
    out["gradient"], out["gradient, drawn at .7"] = (np.asarray(jax.grad(worth_of)(start, t)) for t in (1.0, 0.7))
    of_text = np.zeros((V,) * S)
    np.add.at(of_text, tuple(texts.T), prob[1.0] * advantage[1.0])
    given = of_text[tuple(TEXTS.T)][:, None, None]

    def nats(table: jax.Array) -> jax.Array:  # [27, 8, S]
        return -jax.nn.log_softmax(table, axis=-1)[SHOWN[..., None], np.arange(S), TEXTS[:, None]]

    for name in SURROGATES:
        more, less = weights(name, np.asarray(nats(start)))
        omega = given * np.where(given < 0, less, more)
        out[name] = np.asarray(jax.grad(lambda table: -jnp.sum(omega * nats(table)))(start))  # noqa: B023
    return out


def trial(kind: str, sampler: str, seed: int) -> dict[str, Any]:
    """A network and rewards: of every row its cosine and what a constant reward gives."""
    with jax.enable_x64(True):
        table, reward = network(kind, seed), np.random.default_rng([seed, 1]).random((V,) * S)
        found, still = gradients(table, reward, sampler), gradients(table, reward, sampler, constant=True)
    length, rows = np.linalg.norm, {}
    for name in ("score", "score, drawn at .7, scored at 1", "score, mean of a call", *SURROGATES):
        true = found["gradient, drawn at .7" if "drawn" in name else "gradient"]
        rows[name] = {"cosine": float(np.sum(found[name] * true) / length(found[name]) / length(true)),
                      "constant": float(length(still[name]) / length(true))}
    return {"network": kind, "sampler": sampler, "seed": seed, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown: by surrogate and kind of network the mean cosine, the worst, and what a constant reward gives."""
    records = found["records"]
    kinds = list(dict.fromkeys(r["network"] for r in records))
    lines = []
    for sampler in dict.fromkeys(r["sampler"] for r in records):
        for name in records[0]["rows"]:
            cells = []
            for kind in kinds:
                mine = [r["rows"][name] for r in records if (r["network"], r["sampler"]) == (kind, sampler)]
                cosines, still = ([one[key] for one in mine] for key in ("cosine", "constant"))
                cells.append(f"{np.mean(cosines):.2f} ({np.min(cosines):.2f}), {np.mean(still):.1f}")
            lines.append([sampler, name, *cells])
    return markdown(["rollouts", "", *kinds], lines)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("toy_surrogates"):
        ask = cli.Parser("toy_surrogates", __doc__)
        ask.add_argument("--out", type=Path, default=cli.ROOT / "docs" / "runs" / "toy_surrogates.json")
        ask.add_argument("--tables", type=cli.at_least(1), default=32)
        given = ask.parse_args(argv)
        records = [trial(kind, sampler, seed) for sampler in SAMPLERS for kind in KINDS for seed in range(given.tables)]
        found = {"records": records, "commit": cli.commit()}
        write_json(given.out, found)
        print(table(found))


if __name__ == "__main__":
    main()
