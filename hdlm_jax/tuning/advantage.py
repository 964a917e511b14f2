"""Advantages: how much better a rollout did than the others of its prompt, as GRPO takes them; or each of its calls."""

from __future__ import annotations

import numpy as np

OF_CALLS = ("call", "mdpo")


def advantages(reward: np.ndarray, group: int, kind: str = "mean", drawn: np.ndarray | None = None) -> np.ndarray:
    """float32 [B] from rewards [B], of which each `group` in a row are of one prompt; kinds of calls: [B, C].

    drawn: [B, C], rewards of the texts that the calls drew, for these kinds.

    kind: "mean", less the group's mean: the exact gradient times 1 - 1/group, since a rollout is part of its own
    baseline. "leave_one_out", less the mean of the others: the exact gradient (RLOO, arXiv 2402.14740). "std", "mean"
    over the group's standard deviation (GRPO, arXiv 2402.03300; DCoLT): prompts that are nearly solved or nearly
    hopeless count more than in the mean reward. "wd1" (arXiv 2507.08838): the group's size times softmax(A) -
    softmax(-A) of these rests A; with objective one_pass it is wd1's loss. A group of equal rewards says nothing: 0.

    "call": less the reward of what the call before drew, of the first call less the mean of the others': the exact
    gradient, as what was drawn before a call is no matter of it. "mdpo", as MDPO is released (arXiv 2508.13148): what
    the call's text gained on the one before, and the mean of all later ones (of the last call: its own), standardised
    over the group call by call: not the gradient of the mean reward, as it rewards being right early.
    """
    rows = np.asarray(reward, np.float64).reshape(-1, group)
    rest = rows - rows.mean(1, keepdims=True)
    others = rest * group / (group - 1)
    if kind == "leave_one_out":
        rest = others
    elif kind == "std":
        rest = _over_spread(rest)
    elif kind == "wd1":
        up, down = np.exp(rest), np.exp(-rest)
        rest = group * (up / up.sum(1, keepdims=True) - down / down.sum(1, keepdims=True))
    elif drawn is not None and kind in OF_CALLS:
        each = np.asarray(drawn, np.float64).reshape(-1, group, drawn.shape[1])
        if kind == "call":
            rest = np.concatenate([others[..., None], rows[..., None] - each[..., :-1]], axis=-1)
        else:
            gained = np.diff(each, axis=-1, prepend=0.0)
            sums = np.cumsum(each[..., ::-1], axis=-1)[..., ::-1]
            later = np.concatenate([sums[..., 1:] / np.arange(drawn.shape[1] - 1, 0, -1), each[..., -1:]], axis=-1)
            rest = gained + later
            rest = _over_spread(rest - rest.mean(1, keepdims=True))
        return rest.reshape(-1, drawn.shape[1]).astype(np.float32)
    return rest.reshape(-1).astype(np.float32)


def _over_spread(rest: np.ndarray) -> np.ndarray:
    """rest [prompts, group, ...] over its standard deviation in the group, where it has one."""
    spread = rest.std(1, keepdims=True)
    return rest / np.where(spread > 1e-8, spread, 1.0)
