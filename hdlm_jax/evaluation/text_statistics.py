"""Numbers of sampled texts: how varied they are, perplexities from a judge's nats, MAUVE; intervals of shares.

Units: nats and tokens.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence

import numpy as np

from hdlm_jax.common.console import perplexity as exp

Texts = Sequence[np.ndarray]  # ids int [length] each


def entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the words' frequencies within ids [n]; 0 where there are none."""
    p = np.unique(ids, return_counts=True)[1] / max(len(ids), 1)
    return float(-(p * np.log(p)).sum())


def statistics(texts: Texts) -> dict[str, float | None]:
    """How varied texts are, by the ids that were sampled; None where no text is long enough.

    unigram_entropy: nats, of the words within a text, mean over texts (as in the papers of SEDD and MDLM); it grows
    with their length. corpus_entropy: nats, of the words of all texts together. distinct_n: different n-grams of all
    texts over all there are (Li et al. 2016). repetition_4: share of 4-grams that repeat an earlier one of their text.
    """
    grams = {n: [np.lib.stride_tricks.sliding_window_view(t, n) for t in texts if len(t) >= n] for n in (1, 2, 3, 4)}
    total = {n: sum(map(len, g)) for n, g in grams.items()}

    def different(of: list) -> int:
        return len(np.unique(np.concatenate(of), axis=0))

    out: dict[str, float | None] = {
        "unigram_entropy": float(np.mean([entropy(t) for t in texts])) if len(texts) else None,
        "corpus_entropy": entropy(np.concatenate(grams[1])) if total[1] else None}
    out |= {f"distinct_{n}": different(grams[n]) / total[n] if total[n] else None for n in (1, 2, 3)}
    out["repetition_4"] = 1 - sum(different([g]) for g in grams[4]) / total[4] if total[4] else None
    return out


def ratio(values: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Sum of values [n] over sum of tokens [n], and its standard error between the n (NaN of a single one)."""
    n, total = len(values), tokens.sum()
    mean = values.sum() / total
    se = math.sqrt(n / (n - 1) * np.sum((values - mean * tokens) ** 2)) / total if n > 1 else math.nan
    return float(mean), float(se)


def paired(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], sizes: np.ndarray) -> tuple[float, float]:
    """Nats [n] of b minus those of a over sizes [n], and the standard error, from residuals [n] (elbo.residuals) where
    both have them; without, what strata of noise times fix counts as chance."""
    mean, se = ratio(b["nats"] - a["nats"], sizes)
    if len(sizes) > 1 and "residuals" in a and "residuals" in b:
        se = float(np.linalg.norm(b["residuals"] - a["residuals"]))
    return mean, se


def share_of(right: Sequence[bool] | np.ndarray) -> tuple[float, float]:
    """The share of what is true, and its binomial standard error."""
    share = float(np.mean(right))
    return share, math.sqrt(share * (1 - share) / len(right))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of n; 0 of 10 is (0, .28), not (0, 0)."""
    z = 1.959964
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def in_percent(share: float, n: int) -> str:
    """'25.0 [21.3, 29.1]': a share of n in percent with its Wilson interval."""
    low, high = (f"{100 * end:.1f}" for end in wilson(share, n))
    return f"{100 * share:.1f} [{low}, {high}]"


def perplexities(nats: np.ndarray, tokens: np.ndarray, bound: bool = False) -> dict[str, float | None]:
    """Perplexities from nats and scored tokens of each text [n]; keys end in `_bound` where the nats are bounds.

    nats_per_token: all nats over all tokens, with the standard error of that ratio between texts; perplexity: exp of
    it, its error by the delta method. mean_text_perplexity: mean of exp(nats/tokens) over the texts with a scored
    token, a larger number (Jensen) that some papers quote. None: too few texts to tell.
    """
    some = tokens > 0
    out: dict[str, float | None] = dict.fromkeys(("nats_per_token", "nats_per_token_se", "perplexity", "perplexity_se",
                                                  "mean_text_perplexity", "mean_text_perplexity_se"))
    if some.any():
        mean, se = ratio(nats, tokens)
        with np.errstate(over="ignore"):  # infinity is what it then is
            each = np.exp(nats[some] / tokens[some])
        out |= {"nats_per_token": mean, "perplexity": exp(mean), "mean_text_perplexity": float(each.mean())}
        if len(nats) > 1:
            out |= {"nats_per_token_se": se, "perplexity_se": exp(mean) * se}
        if some.sum() > 1:
            out["mean_text_perplexity_se"] = float(each.std(ddof=1) / math.sqrt(some.sum()))
    return {f"{name}_bound" if bound else name: value for name, value in out.items()}


def mauve_installed() -> bool:
    return importlib.util.find_spec("mauve") is not None


def mauve(features: np.ndarray, reference: np.ndarray) -> float:
    """MAUVE (Pillutla et al. 2021) in [0, 1] of features [n, D] and [m, D], by the package mauve-text."""
    from mauve import compute_mauve

    return float(compute_mauve(p_features=features, q_features=reference).mauve)
