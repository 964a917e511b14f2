"""tools/calibration.py: what a run says of the next state down, against enumeration."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.prediction import LogitsPrediction
from tools import calibration

CLUSTERS = np.array([0, 1, 0, 1])


class Fixed:
    """A network that says the same at all times, of the shape of Predictions."""

    def __init__(self, hierarchy, logits):
        self.hierarchy, self.logits = hierarchy, jnp.asarray(logits)

    def denoise(self, params, z, t, segment=None):
        return self

    def select(self, index):
        return LogitsPrediction(self.logits.reshape(-1, 4)[index], self.hierarchy)


def test_every_token_is_told_by_the_level_it_was_noised_to():
    hierarchy = Hierarchy.from_parents([CLUSTERS.tolist()])
    process = HierarchicalProcess(hierarchy, LevelChain((1.0, 1.0)))
    rng = np.random.default_rng(0)
    logits, x = rng.standard_normal((2, 64, 4)).astype(np.float32), rng.integers(0, 4, (2, 64)).astype(np.int32)
    t, score, key = np.array([0.5, 0.8], np.float32), np.arange(64)[None] % 8 > 0, jax.random.key(0)
    score = np.broadcast_to(score, x.shape)
    step = calibration.make_step(Fixed(hierarchy, logits), process)
    told = np.asarray(step({}, x, score, np.zeros_like(x), t, key)).reshape(2, 2, 64, 4)
    z, level = (np.asarray(a) for a in process.noised(key, jnp.asarray(x), -jnp.log1p(-t), jnp.asarray(score)))
    f = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    seen = set()
    for b, s in np.ndindex(x.shape):
        k, p, truth = int(level[b, s]), f[b, s], x[b, s]
        if k == 2:  # a mask: the clusters' masses
            p, truth = np.array([p[CLUSTERS == c].sum() for c in (0, 1)]), CLUSTERS[truth]
        elif k == 1:  # a cluster: its words alone
            p = np.where(CLUSTERS == CLUSTERS[truth], p, 0) / p[CLUSTERS == CLUSTERS[truth]].sum()
        want = [-np.log(p[truth]), -sum(q * np.log(q) for q in p if q > 0), p.max(), float(p.argmax() == truth)]
        for j in (1, 2):
            np.testing.assert_allclose(told[j - 1, b, s], want if j == k else [np.nan] * 4, rtol=2e-5, atol=1e-6)
        seen.add(k)
    assert seen == {0, 1, 2} and (z[~score] == x[~score]).all()


def test_calibration_error_and_its_bins():
    surest, right = np.array([0.05, 0.06, 0.5, 0.52, 1.0]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    error, bins = calibration.reliability(surest, right)
    assert [b[0] for b in bins] == [2, 2, 1] and sum(b[0] for b in bins) == 5
    np.testing.assert_allclose(np.array(bins)[:, 1:], [[0.055, 0.5], [0.51, 0.5], [1, 1]])
    assert error == pytest.approx((2 * 0.445 + 2 * 0.01) / 5)


def test_texts_are_what_errors_are_of():
    """Rows of equal length: ± is that of the mean of their means, however alike the tokens of a row are."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(30), 8)
    nats = rng.standard_normal(30)[rows] + 0.1 * rng.standard_normal(240)
    found = calibration.record("word", np.stack([nats, 0 * nats, 0 * nats + 0.5, 0 * nats], 1), rows)
    means = nats.reshape(30, 8).mean(1)
    assert found["over"] == pytest.approx(means.mean())
    assert found["over_se"] == pytest.approx(means.std(ddof=1) / 30**0.5)


def test_what_has_no_next_state_of_the_text_is_refused():
    trained = types.SimpleNamespace(diffusion=types.SimpleNamespace(process="hierarchical", xi=0.9, channel=0.0),
                                    model=types.SimpleNamespace(block=0))
    run = types.SimpleNamespace(trained=trained, process=types.SimpleNamespace(unmasks=True))
    with pytest.raises(ValueError, match="xi=0.9.* calibration is of whole rows"):
        calibration.checked(run)
