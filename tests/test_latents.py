"""Latents in front of a text: the exact bound, its gradients and the way back by enumeration; runs that have them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from test_channel import tiny_config as channel_config
from test_sampler import assert_law

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, GenerateConfig, resolve
from hdlm_jax.decoding import latents as decoding
from hdlm_jax.decoding import loop, sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation.elbo import Evaluator, stratified_pairs
from hdlm_jax.models import latents
from hdlm_jax.models.latents import LatentProcess, LatentState, WithError
from hdlm_jax.models.network import Network
from hdlm_jax.runs.import_weights import check_exportable
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums

V, D, G = 4, 4, 2  # words, numbers of a latent, its tokens
PARENTS = {"K=1": [], "K=2": [[0, 1, 0, 1]]}


def make(case, ratio, xi=1.0, seed=0):
    """The process with a random encoder, which is as good as any."""
    hierarchy = Hierarchy.from_parents(PARENTS[case], V)
    chain = LevelChain((1.0, 2.0)[: hierarchy.num_levels])
    return LatentProcess(hierarchy, chain, xi, "cavity", G, D, ratio, latents.init_encoder(jax.random.key(seed), V, G, D))


def log_shown(process):
    """[V, N] log of the chance that a word shows each state, given its level."""
    h, parts = process.hierarchy, [np.eye(V)]
    first = np.where(np.arange(h.sizes[1]) == np.asarray(h.anc[1])[:, None], process.xi, process.leak)
    parts += [first @ np.eye(h.sizes[k])[process.ancestors(1, k)] for k in range(1, h.num_levels + 1)]
    with np.errstate(divide="ignore"):
        return np.log(np.concatenate(parts, axis=1))


class Optimal:
    """The Bayes-optimal network of a joint law [V] * S: a posterior over all texts, given observations and symbols. It
    stands in a LatentNetwork's place for a sampler."""

    def __init__(self, process, joint):
        self.process, self.joint = process, joint
        texts = np.stack(np.unravel_index(np.arange(joint.size), joint.shape), axis=1)
        self.texts, self.shown = jnp.asarray(texts), jnp.asarray(log_shown(process), jnp.float32)
        self.e = latents.encode(process.encoder, self.texts, G)  # [texts, P, D]

    def log_texts(self, u, s):
        """[B, texts] log posterior, u [B, P, D], s [B], up to a number for each row."""
        told = jnp.einsum("bpd,mpd->bm", u, self.e, precision="highest") - 0.5 * s[:, None] * jnp.sum(self.e**2, (1, 2))[None]
        return told + jnp.log(jnp.asarray(self.joint.ravel(), jnp.float32))[None]

    def mean(self, u, s):
        """e^ [B, P, D] where all symbols are masks."""
        return jnp.einsum("bm,mpd->bpd", jax.nn.softmax(self.log_texts(u, s)), self.e, precision="highest")

    def logits(self, z, u, s):
        """[B, S, V]: a word's chance, given the other symbols and all observations."""
        of_words = self.shown[self.texts[None], z[:, None]]  # [B, texts, S]
        others = [jnp.sum(jnp.delete(of_words, i, axis=-1), -1) for i in range(z.shape[1])]
        without = self.log_texts(u, s)[..., None] + jnp.stack(others, axis=-1)
        own = jnp.where(self.texts[..., None] == jnp.arange(V).reshape(1, 1, V), 0.0, -jnp.inf)  # [texts, S, V]
        return jax.nn.logsumexp(without[..., None] + own[None], axis=1)

    @property
    def of_words(self):
        return self

    def read(self, params, state, t, segment):
        return state

    def estimate(self, params, state):
        return self.mean(state.u.reshape(len(state.z), -1, D), state.s[:, 0])

    def denoise(self, params, z, t, segment):
        told, s = params["features"]["given"], self.process.ratio_end
        u, places = told[..., :D] * math.sqrt((s + 1 / D) * (s + 1)), told.shape[1]
        return jnp.pad(self.logits(z[:, places:], u, jnp.full(len(z), s)), ((0, 0), (places, 0), (0, 0)))


# ---- the bound -------------------------------------------------------------------------------------------------------


def bound(process, joint, rows=40_000, seed=0):
    """Means and standard errors [3] of (discrete, continuous, sum), nats a text; one draw for each of `rows` texts."""
    rng, optimal = np.random.default_rng(seed), Optimal(process, joint)
    which = np.searchsorted(np.cumsum(joint.ravel())[:-1], rng.permutation((np.arange(rows) + 0.5) / rows))
    x = np.asarray(optimal.texts)[which]
    tau, q = stratified_pairs(process.proposal(joint.ndim, 0.03), seed, rows, 1)

    @jax.jit
    def rates(x, tau, key):
        state, level = process.noised(key, x, tau, jnp.ones(x.shape, bool))
        u, e = (a.reshape(len(x), -1, D) for a in (state.u, state.e))
        error = 0.5 * jnp.sum((e - optimal.mean(u, state.s[:, 0])) ** 2, -1)
        p = WithError(optimal.logits(state.z, u, state.s[:, 0]), process.hierarchy, jnp.repeat(error, G, axis=1))
        weight = process.nelbo_weight(state, tau)
        return jnp.stack([jnp.sum(jnp.where(level > 0, weight * part(p, x, state, tau=tau), 0.0), axis=-1)
                          for part in process.parts])

    parts = np.asarray(rates(jnp.asarray(x), jnp.asarray(tau[0], jnp.float32), jax.random.key(seed)), float) / q
    parts = np.concatenate([parts, parts.sum(0, keepdims=True)])
    return parts.mean(1), parts.std(1) / math.sqrt(rows)


def information(process, joint, rows=20_000):
    """I(text; U(s_max)) and its standard error, by log p(U | text) / p(U) of draws, in numpy."""
    rng, optimal, s = np.random.default_rng(5), Optimal(process, joint), process.ratio_end
    law, e = joint.ravel(), np.asarray(optimal.e, float).reshape(joint.size, -1)
    which = rng.choice(joint.size, rows, p=law)
    u = s * e[which] + math.sqrt(s) * rng.normal(size=(rows, e.shape[1]))
    log_p = u @ e.T - 0.5 * s * (e**2).sum(1)
    found = log_p[np.arange(rows), which] - np.log(np.exp(log_p - log_p.max(1, keepdims=True)) @ law) - log_p.max(1)
    return found.mean(), found.std() / math.sqrt(rows)


@pytest.mark.parametrize("case, ratio, length, xi", [("K=1", 0.5, 2, 1.0), ("K=2", 4.0, 2, 1.0), ("K=1", 2.0, 4, 1.0),
                                                     ("K=2", 0.5, 4, 0.8)])
def test_the_sum_is_the_entropy(case, ratio, length, xi):
    """One latent and two; the continuous part is what U tells of the text, the discrete one what it leaves. Within 4.5
    standard errors, which are below 2 % of the entropy."""
    process, joint = make(case, ratio, xi), oracle.random_joint(V, length, seed=3)
    mean, se = bound(process, joint)
    told, told_se = information(process, joint)
    whole = oracle.entropy(joint)
    assert mean[2] == pytest.approx(whole, abs=4.5 * se[2]) and se[2] < 0.02 * whole
    assert mean[1] == pytest.approx(told, abs=4.5 * math.hypot(se[1], told_se)) and told > 0.1 * whole
    assert mean[0] == pytest.approx(whole - told, abs=4.5 * math.hypot(se[0], told_se)) and mean[0] + 5 * se[0] < whole
