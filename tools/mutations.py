"""Are the tests of draws and rewards able to fail? One line of the code is changed, and its test has to turn red.

    python -m tools.mutations [--only=replay,clip]

Each mutation is made in a copy of what is checked out, and reverted; the test is first seen to pass there. About a
minute each on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hdlm_jax.common.console import say
from tools import cli


class Mutation(NamedTuple):
    """In `file` the one place of `old` becomes `new`; `test`: a node of pytest that must fail then."""

    file: str
    old: str
    new: str
    test: str


RECORD, UPDATE, TUNING = "hdlm_jax/tuning/record.py", "hdlm_jax/tuning/update.py", "tests/test_tuning.py::"
MUTATIONS = {
    "weights": Mutation("hdlm_jax/training/views.py", "jnp.pad(chain.weight(tau),",
                        "jnp.pad(jnp.ones_like(chain.weight(tau)),",
                        "tests/test_views.py::test_crossings_are_unbiased"),
    "shares": Mutation("hdlm_jax/training/views.py", "    if alone:\n        chance =",
                       "    chance = jnp.where(level == k[:, None] + 1, 1.0, 0.0)\n    if alone:\n        chance =",
                       "tests/test_views.py::test_crossings_are_unbiased"),
    "replay": Mutation(RECORD, "rollout.fell >= at + more", "rollout.fell > at + more",
                       TUNING + "test_replay_rebuilds_every_frame"),
    "score": Mutation(UPDATE, "out = out + jnp.where((to < k)", "out = jnp.where((to < k)",
                      TUNING + "test_score_is_the_gradient_of_the_mean_reward"),
    "draws": Mutation(UPDATE, "z, _, level, to, x, turn, t, length = replay(process, rollout, call)",
                      "z, _, level, to, x, turn, t, length = replay(process, rollout._replace(seen=None), call)",
                      TUNING + "test_score_is_the_gradient_of_the_mean_reward"),
    "order": Mutation(UPDATE, "cost += order.nats(", "cost -= order.nats(",
                      TUNING + "test_both_parts_of_a_drawn_order_are_trained"),
    "constant": Mutation(UPDATE, "return omega * view.weight", "return (omega + 0.1) * view.weight",
                         TUNING + "test_score_is_the_gradient_of_the_mean_reward"),
    "views": Mutation(UPDATE, "scale = rollout.calls / jnp.clip(rollout.calls, 1, views)", "scale = scale",
                      TUNING + "test_one_call_of_a_rollout_stands_for_all"),
    "clip": Mutation(UPDATE, "jnp.where(beyond, 0.0, ratio)", "ratio",
                     TUNING + "test_clipped_ratios_and_the_reference_as_omega"),
    "kl": Mutation(UPDATE, "omega + tune.kl * (now - self.nats(reference, view))",
                   "omega + tune.kl * (self.nats(reference, view) - now)",
                   TUNING + "test_clipped_ratios_and_the_reference_as_omega"),
    "text": Mutation(UPDATE, "/ jnp.maximum(free, 1)", "/ 1",
                     TUNING + "test_a_ratio_of_texts_is_a_mean_over_their_tokens"),
    "spg": Mutation(UPDATE, "UPPER, SHARE = 1.5, 0.5", "UPPER, SHARE = 1.0, 0.5",
                    TUNING + "test_spg_prices_what_is_to_be_avoided_from_above"),
    "hidden": Mutation(UPDATE,
                       "jnp.where(view.to < view.level, jnp.exp(-UPPER * now) / jnp.maximum(whole, 1e-30), 0.0)",
                       "jnp.exp(-UPPER * now) / jnp.maximum(whole, 1e-37)",
                       TUNING + "test_spg_prices_what_is_to_be_avoided_from_above"),
    "nodes": Mutation(UPDATE, "(part[number], (len(x),))", "(part[0], (len(x),))",
                      TUNING + "test_nodes_are_exact_up_to_twice_as_many_tokens"),
    "crossings": Mutation(UPDATE, "@ np.arange(chain.num_levels + 1) / chain.num_levels", "[:, 1:].sum(1)",
                          TUNING + "test_nodes_lie_evenly_in_crossings"),
    "coupled": Mutation(UPDATE, "hidden, share, 0.5 / share)", "hidden, share, 1 / share)",
                        TUNING + "test_surrogates_weigh_what_they_hide"),
    "wd1": Mutation("hdlm_jax/tuning/advantage.py", "np.exp(rest), np.exp(-rest)", "np.exp(rest), np.exp(0 * rest)",
                    "tests/test_tune.py::test_wd1_weighs_by_two_softmaxes"),
    "resume": Mutation("hdlm_jax/runs/tune.py", "key = jax.random.fold_in(key, number)\n        rollout",
                       "key = jax.random.fold_in(key, number - self.start)\n        rollout",
                       "tests/test_tune.py::test_it_resumes_between_steps_bit_for_bit"),
}


def copied(folder: Path) -> None:
    """What git would commit of the checkout, into a folder."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=cli.ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (cli.ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((cli.ROOT / name).read_bytes())


def passes(folder: Path, test: str) -> bool:
    """Whether a test passes there; ValueError where it could not be run."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise ValueError(f"{test} could not be run: {(done.stdout + done.stderr)[-500:]}")
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("mutations"):
        ask = cli.Parser("mutations", __doc__)
        ask.add_argument("--only", type=cli.listed(str), default=list(MUTATIONS), metavar="LIST")
        given = ask.parse_args(argv)
        if unknown := [name for name in given.only if name not in MUTATIONS]:
            raise ValueError(f"--only={','.join(unknown)}: choose among {', '.join(MUTATIONS)}")
        green, alive = set[str](), []
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            copied(folder)
            for name in given.only:
                m = MUTATIONS[name]
                if m.test not in green and not passes(folder, m.test):
                    raise ValueError(f"{m.test} fails as it is")
                green.add(m.test)
                text = (folder / m.file).read_text()
                if text.count(m.old) != 1:
                    raise ValueError(f"{name}: {m.file} has {text.count(m.old)} places of {m.old!r}, and not one")
                (folder / m.file).write_text(text.replace(m.old, m.new))
                survived = passes(folder, m.test)
                (folder / m.file).write_text(text)
                say(f"mutations: {name}: {m.test} is " + ("GREEN" if survived else "red"))
                alive += [name] * survived
        if alive:
            raise ValueError(f"not noticed: {', '.join(alive)}")


if __name__ == "__main__":
    main()
