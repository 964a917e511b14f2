"""What a run can learn beside the bound or afterwards, on texts whose law is known (docs/training.md).

    python -m tools.lessons energy [--out=docs/runs/lesson_energy.json]
    python -m tools.lessons certainty
    python -m tools.lessons adjust
    python -m tools.lessons drafts

energy   texts of a Markov chain of words (tools/toy_calls.py: four of four words, behind a word that is given); a
         network of one block is trained on them, then its energy; the total variation of texts drawn in few calls, by
         the number of candidates, also with the sign of the released code.
certainty  texts whose prompt decides them (the parities of the first 1..6 of six bits) and texts that nothing decides
         (permutations of six symbols): calls of threshold decoding, right answers and different ones before and after
         certainty forcing on own texts, and after as many steps of cross-entropy alone; parities-300: of a base that
         was stopped early.
adjust   permutations once more: six drops on so many passes of the network, drawn on their own or with a layer between.
drafts   permutations: as many steps with train.draft_share = 0, .25 and .5, without clusters and with three; the exact
         bound, and texts of the methods that take words back beside those that do not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax import config as settings
from hdlm_jax.common.console import markdown
from hdlm_jax.common.jsons import write_json
from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import Config
from hdlm_jax.decoding import bursts, choose, guide, loop, presets
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.adjust import Adjust
from hdlm_jax.models.energy import EnergyNetwork
from hdlm_jax.training.state import TrainState, build, init_state, make_optimizer
from hdlm_jax.training.step import make_loss_sums, make_train_step
from hdlm_jax.tuning import adjust, certainty, energy
from hdlm_jax.tuning.lesson import make_step
from tools import cli, toy_calls

V, S = toy_calls.V, toy_calls.S + 1  # a word in front is given: in a row of masks alone no mask differs from another
HIERARCHIES = {"none": [], "classes": [[0, 0, 1, 1, 2]]}
CANDIDATES, CALLS, TEXTS = (1, 2, 4, 16), (1, 2, 4), 40_000
SYMBOLS, BITS, THRESHOLD, JUDGED = 6, 6, 0.9, 1024
SHARES = (0.0, 0.25, 0.5)
METHODS = ("ancestral", "low_confidence block=0", "remdm", "rcr block=0", "p2", "p2 eta=.5", "saber draw=sample")
TAUGHT = ((3e-3, 1000), (1e-3, 500))  # (rate, steps) of training: without drafts, then with them
# clusters of the symbols and of the word in front, methods, what training there is, the last of it with drafts
DRAFTED: dict[str, tuple[list[list[int]], tuple[str, ...], tuple[tuple[float, int], ...]]] = {
    "none": ([], METHODS, TAUGHT), "none at the start": ([], METHODS, TAUGHT[:1]),
    "three": ([[0, 0, 0, 1, 1, 1, 2]], (*METHODS, "rcr block=0 straight=false", "p2 straight=false",
                                        "p2 straight=false eta=.5", "p2 straight=false eta=.5 to=cluster"), TAUGHT)}


def toy_config(length: int, objective: str = "nelbo", steps: int = 3000, seed: int = 0, clusters: int = 1,
               **more: Any) -> Config:
    """A network of one block and width 32 for such texts."""
    c = settings.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257  # not used, but checked
    c.hierarchy.clusters, c.diffusion.weighting = (clusters,), "none"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 32, 1, 2, length
    c.model.time_conditioning = False
    c.optimizer.lr, c.optimizer.warmup, c.train.batch_size = 3e-3, 100, 128
    c.train.steps, c.train.seed, c.train.objective, c.train.init_from = steps, seed, objective, "base"
    for name, value in more.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return settings.resolve(c)


def batches(draw: Callable[[np.random.Generator, int], np.ndarray], given: int, rows: int, seed: int
            ) -> Callable[[int], dict[str, np.ndarray]]:
    """batch(step) of texts draw(rng, n) -> int32 [n, S], whose first `given` words are prompts."""
    rng = np.random.default_rng(seed)

    def batch(step: int) -> dict[str, np.ndarray]:
        x = draw(rng, rows).astype(np.int32)
        return {"x": x, "index": np.arange(rows), "score": np.tile(np.arange(x.shape[1]) >= given, (rows, 1))}

    return batch


def chain_texts(p: np.ndarray) -> Callable[[np.random.Generator, int], np.ndarray]:
    """draw of the law p [V] * (S - 1) behind the word V."""
    texts = np.array(list(np.ndindex(p.shape)), np.int32)
    return lambda rng, n: np.concatenate([np.full((n, 1), V), texts[rng.choice(len(texts), n, p=p.ravel())]], axis=1)


def fit(state: TrainState, step: Callable[..., Any], batch: Callable[[int], Any], given: Any, steps: int
        ) -> tuple[TrainState, dict[str, float]]:
    """(the state after so many steps, means of their last fifth's metrics)."""
    many, last = 50, list[dict[str, jax.Array]]()
    run = jax.jit(lambda state, rows, given: jax.lax.scan(lambda state, one: step(state, one, given), state, rows))
    for i in range(0, steps, many):
        rows = jax.tree.map(lambda *a: jnp.stack(a), *(batch(i + j) for j in range(many)))
        state, metrics = run(state, rows, given)
        last = (last + [metrics])[-max(1, steps // many // 5):]
    return state, {name: float(np.mean([one[name] for one in last])) for name in last[0]}


def trained_base(config: Config, hierarchy: Hierarchy, batch: Callable[[int], Any], start: Tree | None = None
                 ) -> tuple[Any, HierarchicalProcess, Tree]:
    """(network, process, parameters) of a run of such texts, from the parameters `start` or from chance."""
    network, process = build(config, hierarchy)
    tx, _ = make_optimizer(config)
    key = jax.random.key(config.train.seed)
    step = make_train_step(config, network, process, tx)
    state = init_state(config, network, tx, key)
    state = state if start is None else state._replace(params=jax.tree.map(jnp.copy, start))
    state, _ = fit(state, step, batch, key, config.train.steps)
    return network, cast(HierarchicalProcess, process), state.params


def law_of(words: np.ndarray) -> np.ndarray:
    """Shares of texts [n, S], [V + 1] * (S - 1): the word in front may be drawn elsewhere as well."""
    place = words[:, 1:] @ (V + 1) ** np.arange(S - 1)[::-1]
    return np.bincount(place, minlength=(V + 1) ** (S - 1)).reshape((V + 1,) * (S - 1)) / len(words)


def drawer(base: Any, params: Tree, process: HierarchicalProcess, candidates: int, tool: Any) -> Callable[..., Any]:
    """draw(key, calls, sign) -> texts [TEXTS, S] in so many calls of the ancestral grid, by exp(-sign E)."""
    draw: Any = guide.EnergyDraw(candidates) if candidates > 1 else "sample"
    policy, window = Policy(choose.Planned("grid"), draw), {"energy_from": jnp.float32(0), "energy_to": jnp.float32(1)}
    z = jnp.full((TEXTS, S), process.mask_id).at[:, 0].set(V)

    @jax.jit
    def run(key: jax.Array, calls: jax.Array, sign: jax.Array) -> jax.Array:
        how = loop.Sampling(tools={"energy": lambda *given: sign * tool(*given)}, rows=2000, tokens=10_000)
        return loop.sample(key, lambda z, t: base.denoise(params, z, t), process, z, policy,
                           {"steps": calls, **window}, how=how)[0]

    return run


def trial_energy(kind: str, seed: int, steps: int = 6000) -> dict[str, Any]:
    """One seed: the energy of a trained network, and what it makes of few calls."""
    p, began = toy_calls.joint("chain"), time.monotonic()
    off = lambda words: float(0.5 * np.abs(law_of(words) - np.pad(p, (0, 1))).sum())  # noqa: E731
    hierarchy, draw_texts = Hierarchy.from_parents(HIERARCHIES[kind], vocab_size=V + 1), chain_texts(p)
    clusters = 3 if HIERARCHIES[kind] else 1
    base, process, frozen = trained_base(toy_config(S, seed=seed, clusters=clusters), hierarchy,
                                         batches(draw_texts, 1, 128, seed))
    config = toy_config(S, "energy", steps, seed, clusters)
    network = cast(EnergyNetwork, build(config, process.hierarchy)[0])
    tx, _ = make_optimizer(config)
    state = init_state(config, network, tx, jax.random.key(seed))
    state = state._replace(params={**frozen, "head": state.params["head"]})  # type: ignore[dict-item]
    step = make_step(config, energy.make_loss(config, network, base, process), tx)
    state, metrics = fit(state, step, batches(draw_texts, 1, 128, seed + 100), (jax.random.key(seed), frozen), steps)
    tool, key = lambda x, z, log_p, t: network.energy(state.params, z, x, t), jax.random.key(seed)  # noqa: E731
    distance: dict[str, dict[str, float]] = {}
    for k in CANDIDATES:
        draw = drawer(base, frozen, process, k, tool)
        distance[str(k)] = {str(calls): off(np.asarray(draw(key, jnp.int32(calls), 1.0))) for calls in CALLS}
        if k == CANDIDATES[-1]:
            distance[f"{k}, exp(+E)"] = {str(calls): off(np.asarray(draw(key, jnp.int32(calls), -1.0)))
                                         for calls in CALLS}
    return {"hierarchy": kind, "seed": seed, "distance": distance, "nce": metrics["loss"],
            "told_apart": metrics["told_apart"], "seconds": time.monotonic() - began}


def spread(found: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, where there are some."""
    return f"{np.mean(found):.{digits}f}" + (f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else "")


def table_energy(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: total variation by hierarchy and candidates, mean and spread over seeds."""
    rows = []
    for kind in dict.fromkeys(r["hierarchy"] for r in records):
        mine = [r for r in records if r["hierarchy"] == kind]
        for k in mine[0]["distance"]:
            cells = []
            for calls in map(str, CALLS):
                found = [r["distance"][k][calls] for r in mine if calls in r["distance"][k]]
                cells.append(spread(found) if found else "")
            rows.append([kind, k, *cells])
    return markdown(["clusters", "candidates", *(f"{n} call{'s' * (n > 1)}" for n in CALLS)], rows)


def parities(rng: np.random.Generator, n: int) -> np.ndarray:
    """Six bits and the parities of the first 1..6 of them."""
    bits = rng.integers(0, 2, (n, BITS))
    return np.concatenate([bits, np.cumsum(bits, axis=1) % 2], axis=1)


def permutations(rng: np.random.Generator, n: int) -> np.ndarray:
    """A word in front, six symbols each once."""
    return np.concatenate([np.full((n, 1), SYMBOLS), np.argsort(rng.random((n, SYMBOLS)), axis=1)], axis=1)


# texts, words of a prompt, words there are, function of texts -> which are right
CERTAIN: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], int, int, Callable[[np.ndarray], Any]]] = {
    "permutations": (permutations, 1, SYMBOLS + 1,
                     lambda x: (np.sort(x[:, 1:], axis=1) == np.arange(SYMBOLS)).all(1)),
    **dict.fromkeys(("parities", "parities-300"), (
        parities, BITS, 2, lambda x: (np.cumsum(x[:, :BITS], axis=1) % 2 == x[:, BITS:]).all(1)))}
TWO = {"model__blocks": 2, "diffusion__weighting": "constant"}  # one block, twice as long: 16 % are right
LEARNS: dict[str, dict[str, Any]] = {  # of the base, which learns for 1,500 steps, or for 300 where it is to be unsure
    "permutations": {"steps": 1500}, "parities": {"steps": 1500, **TWO}, "parities-300": {"steps": 300, **TWO}}


def trial_certainty(kind: str, seed: int, steps: int = 400) -> dict[str, Any]:
    """One seed: a trained run, its own texts, and threshold decoding before and after forcing."""
    draw_texts, given, words, judge = CERTAIN[kind]
    began, rng, free = time.monotonic(), np.random.default_rng(seed), given if given > 1 else SYMBOLS
    length = given + free
    batch = batches(draw_texts, given, 128, seed)
    hierarchy = Hierarchy.from_parents([], vocab_size=words)
    base, process, frozen = trained_base(toy_config(length, seed=seed, **LEARNS[kind]), hierarchy, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def write(method: str, params: Tree, x: jax.Array, key: jax.Array) -> Any:
        found = presets.make(*method.partition(" ")[::2], steps=free)
        z = jnp.where(jnp.arange(length)[None] < given, x, process.mask_id)
        return loop.sample(key, lambda z, t: base.denoise(params, z, t), process, z, found.policy,
                           jax.tree.map(jnp.asarray, presets.numbers(found)))

    def decoded(params: Tree) -> dict[str, float]:
        x, told = write(f"fast_dllm threshold={THRESHOLD} draw=sample block=0", params,
                        jnp.asarray(draw_texts(rng, JUDGED), jnp.int32), jax.random.key(seed + 1))
        x = np.asarray(x)
        return {"calls": float(told["row_forwards"].mean()), "right": float(judge(x).mean()),
                "distinct": len(np.unique(x, axis=0)) / len(x)}

    own = np.asarray(write("max_prob", frozen, jnp.asarray(draw_texts(rng, 2048), jnp.int32), jax.random.key(seed))[0])
    out = {"texts": kind, "seed": seed, "own_right": float(judge(own).mean()), "before": decoded(frozen)}
    for name, weight in (("cross_entropy", 0.0), ("certainty", 2.0)):
        config = toy_config(length, "certainty", steps, seed, optimizer__lr=1e-3, tune__certainty=weight,
                            generate__method="fast_dllm", generate__options="block=0")
        tx, _ = make_optimizer(config)
        state = init_state(config, base, tx, jax.random.key(seed))._replace(params=frozen)
        step = make_step(config, certainty.make_loss(config, base, base, process), tx)
        some = batches(lambda rng, n: own[rng.integers(0, len(own), n)], given, 128, seed)
        state, metrics = fit(state, step, some, (jax.random.key(seed), {}), steps)
        out[name] = decoded(state.params) | {"entropy": metrics["entropy"]}
    return out | {"seconds": time.monotonic() - began}


def table_certainty(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: threshold decoding before and after, means and spreads over seeds."""
    rows = []
    for kind in dict.fromkeys(r["texts"] for r in records):
        for name in ("before", "cross_entropy", "certainty"):
            found = {k: [r[name][k] for r in records if r["texts"] == kind] for k in ("calls", "right", "distinct")}
            rows.append([kind, name.replace("_", "-"), *(spread(v, 2 if k == "calls" else 3)
                                                         for k, v in found.items())])
    return markdown(["texts", "after", "calls", "right", "different"], rows)


def trial_adjust(kind: str, seed: int, steps: int = 1500) -> dict[str, Any]:
    """One seed: a trained run, a layer behind it, and right and different texts by passes of the network."""
    draw_texts, given, words, judge = CERTAIN[kind]
    began, length, rng = time.monotonic(), given + SYMBOLS, np.random.default_rng(seed)
    batch = batches(draw_texts, given, 128, seed)
    hierarchy = Hierarchy.from_parents([], vocab_size=words)
    base, process, frozen = trained_base(toy_config(length, steps=1500, seed=seed), hierarchy, batch)
    config = toy_config(length, "adjust", steps, seed, generate__method="adjust", generate__options=f"burst={SYMBOLS}")
    layer = cast(Adjust, build(config, hierarchy)[0])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def write(every: int, adjusted: Any, z: jax.Array, reveals: jax.Array, key: jax.Array) -> Any:
        denoise = bursts.Bursts(bursts.Burst(every), base, frozen, adjusted, False)
        return loop.sample(key, denoise, process, z, Policy(choose.Planned("reveal")), {"reveals": reveals})

    def told(every: int, reveals: int, adjusted: Any) -> dict[str, float]:
        x, found = write(every, adjusted, canvas[:JUDGED], jnp.int32(reveals), jax.random.key(seed + 1))
        return {"passes": float(found["row_forwards"].mean()), "right": float(judge(np.asarray(x)).mean()),
                "distinct": len(np.unique(x, axis=0)) / JUDGED}

    def same(h: jax.Array, *rest: Any) -> jax.Array:
        return h

    canvas = jnp.full((2048, length), process.mask_id).at[:, :given].set(draw_texts(rng, 2048)[:, :given])
    own = np.asarray(write(1, same, canvas, jnp.int32(1), jax.random.key(seed))[0])
    tx, _ = make_optimizer(config)
    step = make_step(config, adjust.make_loss(config, layer, base, process), tx)
    state, metrics = fit(init_state(config, layer, tx, jax.random.key(seed)), step, batches(
        lambda rng, n: own[rng.integers(0, len(own), n)], given, 128, seed), (jax.random.key(seed), frozen), steps)
    learnt = functools.partial(layer.adjusted, state.params)
    out = {str(SYMBOLS // many): {"alone": told(1, many, same)} | ({"layer": told(many, 1, learnt)} if many > 1 else {})
           for many in (1, 2, 3, SYMBOLS)}
    return {"texts": kind, "seed": seed, "loss": metrics["loss"], "without": metrics["without"], "passes": out,
            "seconds": time.monotonic() - began}


def table_adjust(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: right and different texts by passes, means and spreads over seeds."""
    rows = []
    for passes in records[0]["passes"]:
        cells = []
        for how in ("alone", "layer"):
            for name in ("right", "distinct"):
                found = [r["passes"][passes][how][name] for r in records if how in r["passes"][passes]]
                cells.append(spread(found) if found else "")
        rows.append([passes, *cells])
    return markdown(["passes", "alone: right", "different", "layer: right", "different"], rows)


@functools.cache
def drafted_network(kind: str) -> tuple[Hierarchy, Callable[..., Any], Callable[..., Any]]:
    """(hierarchy, write(policy, params, numbers, key) -> (texts, passes), bound(params) -> nats a token)."""
    parents, length = DRAFTED[kind][0], 1 + SYMBOLS
    hierarchy, clusters = Hierarchy.from_parents(parents, vocab_size=SYMBOLS + 1), 3 if parents else 1
    judged = toy_config(length, "count", clusters=clusters, train__batch_size=JUDGED)
    network, process = build(judged, hierarchy)
    held_out, sums = batches(permutations, 1, JUDGED, 99), jax.jit(make_loss_sums(judged, network, process))

    @functools.partial(jax.jit, static_argnums=0)
    def write(policy: Policy, params: Tree, numbers: Tree, key: jax.Array) -> Any:
        z = jnp.full((JUDGED, length), process.mask_id).at[:, 0].set(SYMBOLS)
        x, told = loop.sample(key, lambda z, t: network.denoise(params, z, t), cast(HierarchicalProcess, process), z,
                              policy, numbers)
        return x, jnp.mean(told["row_forwards"])

    def bound(params: Tree) -> float:
        found = [sums(params, held_out(i), jax.random.key(i))[1:] for i in range(16)]
        return float(np.mean([nats / tokens for nats, tokens in found]))

    return hierarchy, write, bound


def trial_drafts(kind: str, seed: int) -> dict[str, Any]:
    """One seed: a run for every share of drafts, its exact bound, and what each method writes."""
    began, (hierarchy, write, bound) = time.monotonic(), drafted_network(kind)
    (parents, methods, (*before, last)), shares = DRAFTED[kind], dict[str, Any]()

    def learn(rate: float, steps: int, share: float, start: Tree | None) -> Tree:
        config = toy_config(1 + SYMBOLS, steps=steps, seed=seed, clusters=3 if parents else 1, train__draft_share=share,
                            optimizer__lr=rate)
        texts = batches(permutations, 1, 128, seed + (100 if start else 0))
        return trained_base(config, hierarchy, texts, start)[2]

    start = learn(*before[0], 0.0, None) if before else None
    for share in SHARES:
        params, written = learn(*last, share, start), dict[str, Any]()
        for method in methods:
            for many in (3, 6) if "saber" not in method else (6,):  # it counts no calls
                found = presets.make(*method.partition(" ")[::2], steps=many)
                numbers = jax.tree.map(jnp.asarray, presets.numbers(found))
                x, passes = jax.tree.map(np.asarray, write(found.policy, params, numbers, jax.random.key(seed + 1)))
                written.setdefault(method, {})[str(many)] = {
                    "passes": float(passes), "right": float(CERTAIN["permutations"][3](x).mean()),
                    "distinct": len(np.unique(x, axis=0)) / JUDGED}
        shares[f"{share:g}"] = {"bound": bound(params), "methods": written}
    return {"clusters": kind, "seed": seed, "shares": shares, "seconds": time.monotonic() - began}


def table_drafts(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the bound, and right and different texts by method and steps, means and spreads over seeds, for each
    share of drafts; passes: the mean over all."""
    rows, shares = list[list[str]](), list(records[0]["shares"])
    for kind in dict.fromkeys(r["clusters"] for r in records):
        mine = [r["shares"] for r in records if r["clusters"] == kind]
        rows.append([kind, "bound, nats/token", "", "", *(spread([one[share]["bound"] for one in mine])
                                                          for share in shares), *[""] * len(shares)])
        for method, by_steps in mine[0][shares[0]]["methods"].items():
            for steps in by_steps:
                found = [[one[share]["methods"][method][steps] for one in mine] for share in shares]
                rows.append([kind, method, steps, f"{np.mean([f['passes'] for one in found for f in one]):.1f}", *(
                    spread([f[name] for f in one]) for name in ("right", "distinct") for one in found)])
    head = [f"{name}, share {share}" for name in ("right", "different") for share in shares]
    return markdown(["clusters", "method", "steps", "passes", *head], rows)


TRIALS: dict[str, tuple[Sequence[str], Callable[[str, int], dict[str, Any]], Callable[..., str]]] = {
    "energy": (tuple(HIERARCHIES), trial_energy, table_energy),
    "certainty": (tuple(CERTAIN), trial_certainty, table_certainty),
    "adjust": (("permutations",), trial_adjust, table_adjust),
    "drafts": (tuple(DRAFTED), trial_drafts, table_drafts)}


def table(found: dict[str, Any]) -> str:
    """Markdown of a file of this tool's."""
    return TRIALS[found["lesson"]][2](found["records"])


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("lessons"):
        ask = cli.Parser("lessons", __doc__)
        ask.add_argument("lesson", choices=list(TRIALS))
        ask.add_argument("--out", type=Path)
        ask.add_argument("--kinds", help="of texts or clusters, by commas; all of the lesson's where it is not given")
        ask.add_argument("--seeds", type=cli.at_least(1), default=3)
        given = ask.parse_args(argv)
        kinds, trial, _ = TRIALS[given.lesson]
        records = []
        chosen = given.kinds.split(",") if given.kinds else kinds
        if not set(chosen) <= set(kinds):
            raise ValueError(f"--kinds={given.kinds}: choose of {', '.join(kinds)}")
        for kind in chosen:
            for seed in range(given.seeds):
                records.append(trial(kind, seed))
                print(f"lessons: {records[-1]}", flush=True)
                out = given.out or Path(f"docs/runs/lesson_{given.lesson}.json")
                found = {"lesson": given.lesson, "records": records}
                write_json(out, found)
        print(table(found))


if __name__ == "__main__":
    main()
