"""When does a hierarchy pay in few calls? Exact sampling errors on joints that are known (docs/findings.md).

    python -m tools.toy_calls [--out=docs/runs/toy_calls.json]

Four positions of four words, two classes of two; the network is the Bayes-optimal one, so nothing but the sampler is at
fault. For each joint and hierarchy (none; its classes; classes that cut across them) and each number of steps: the
divergence KL(data || sampler) in nats a text, by the likelihood of all 256 texts under the method. `max_prob` is exact;
of `ancestral` the law is the mean over --plans random plans. Joints, each with classes c_i and words w_i in them:

  chain    a Markov chain of words, its transitions random
  classes  a Markov chain of classes, words drawn in their class on their own: all dependence is of classes
  agree    classes drawn on their own, each word decided (9 times of 10) by the class before it: given all classes,
           nothing is left to depend on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

import hdlm_jax as hd
from hdlm_jax.common.console import markdown
from hdlm_jax.common.jsons import write_json
from hdlm_jax.decoding import presets
from hdlm_jax.decoding.loop import loop_of
from hdlm_jax.decoding.presets import Method
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.process import Process
from hdlm_jax.evaluation.likelihood import teacher_forced
from tools import cli

V, S, CALLS = 4, 4, (1, 2, 3, 4, 6, 8)
HIERARCHIES = {"none": None, "classes": (0, 0, 1, 1), "across": (0, 1, 0, 1)}
JOINTS = ("chain", "classes", "agree")
METHODS = {"max_prob": presets.max_prob(steps=1), "ancestral": presets.ancestral(steps=1)}


def joint(name: str, seed: int = 0) -> np.ndarray:
    """float64 [V] * S; a word is 2 class + which."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet(np.full(V, 0.3), V)
    stay = np.array([[0.9, 0.1], [0.1, 0.9]])
    out = np.zeros((V,) * S)
    for x in np.ndindex(out.shape):
        p = 1 / V
        for before, word in zip(x, x[1:], strict=False):
            if name == "chain":
                p *= chain[before, word]
            elif name == "classes":
                p *= stay[before // 2, word // 2] / 2
            else:
                p *= 0.5 * (0.9 if word % 2 == before // 2 else 0.1)
        out[x] = p
    return out / out.sum()


def bayes(p: np.ndarray, process: Process) -> np.ndarray:
    """[N^S, S, V] the law of each position's word given the states of the others (the cavity form's f)."""
    h = process.hierarchy
    shows = np.concatenate([np.eye(n)[np.asarray(anc)].T for n, anc in zip(h.sizes, h.anc, strict=True)])  # [N, V]
    out = []
    for i in range(S):
        table = np.moveaxis(p, i, -1)
        for _ in range(S - 1):  # the first axis goes, its states come last
            table = np.moveaxis(np.tensordot(shows, table, (1, 0)), 0, S - 2)
        table = np.broadcast_to(np.expand_dims(table, i), (len(shows),) * S + (V,))
        out.append(table.reshape(-1, V))
    found = np.stack(out, 1)
    return found / np.maximum(found.sum(-1, keepdims=True), 1e-300)


def walker(process: Process, method: Method) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """walk(logits [N^S, S, V], texts [n, S], numbers, key) -> (nats [n], calls [n]) under the method, compiled once."""
    place = jnp.asarray(process.num_states ** np.arange(S)[::-1])
    policy = teacher_forced(method, process)

    @jax.jit
    def walk(logits: jax.Array, texts: jax.Array, numbers: Mapping[str, jax.Array], key: jax.Array
             ) -> tuple[jax.Array, jax.Array]:
        loop = loop_of(lambda z, t: logits[jnp.sum(z * place[None], axis=-1)], cast(HierarchicalProcess, process),
                       policy, texts.shape, numbers)
        cache, s = loop.begin(key, jnp.full(texts.shape, process.mask_id), extra={"text": texts})
        _, s, _ = loop.run(cache, s)
        return s.memory["nats"].sum(-1), s.call

    return walk


def divergences(plans: int) -> list[dict]:
    """One record a joint, hierarchy and method: KL(data || sampler) in nats, by calls."""
    out = []
    texts = np.array(list(np.ndindex((V,) * S)), np.int32)
    for kind, classes in HIERARCHIES.items():
        process = hd.masked(V) if classes is None else hd.hierarchical(classes)
        for name, method in METHODS.items():
            walk, many = walker(process, method), plans if name == "ancestral" else 1
            for of in JOINTS:
                p = joint(of)
                logits, kl, took = jnp.asarray(np.log(bayes(p, process) + 1e-30), jnp.float32), {}, {}
                for calls in CALLS[process.num_levels - 1 :]:
                    nats, used = walk(logits, np.tile(texts, (many, 1)), {"steps": jnp.int32(calls)}, jax.random.key(0))
                    took[str(calls)] = float(jnp.mean(used))
                    law = np.exp(-np.asarray(nats, np.float64)).reshape(many, -1).mean(0)
                    kl[str(calls)] = float(np.sum(p.reshape(-1) * (np.log(p.reshape(-1)) - np.log(law))))
                alone = [p.sum(tuple(j for j in range(S) if j != i)) for i in range(S)]
                out.append({"joint": of, "hierarchy": kind, "method": name, "kl": kl, "calls": took,
                            "entropy": entropy(p), "total_correlation": sum(map(entropy, alone)) - entropy(p)})
    return sorted(out, key=lambda r: JOINTS.index(r["joint"]))


def entropy(p: np.ndarray) -> float:
    """Nats."""
    return float(-np.sum(p * np.log(np.maximum(p, 1e-300))))


def table(records: Sequence[dict]) -> str:
    """Markdown of all records."""
    rows = [[r["joint"], r["hierarchy"], r["method"], *(f"{r['kl'][str(n)]:.4f}" if str(n) in r["kl"] else ""
                                                        for n in CALLS)] for r in records]
    return markdown(["joint", "hierarchy", "order", *(f"{n} steps" if n > 1 else "1 step" for n in CALLS)], rows)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("toy_calls"):
        ask = cli.Parser("toy_calls", __doc__)
        ask.add_argument("--out", type=Path, default=Path("docs/runs/toy_calls.json"))
        ask.add_argument("--plans", type=cli.at_least(1), default=200, help="that ancestral is the mean of")
        given = ask.parse_args(argv)
        records = divergences(given.plans)
        write_json(given.out, records)
        print(table(records))


if __name__ == "__main__":
    main()
