"""Advantages: how much better a rollout did than the others of its prompt, as GRPO takes them."""

from __future__ import annotations

import numpy as np


def advantages(reward: np.ndarray, group: int, kind: str = "mean") -> np.ndarray:
    """float32 [B] from rewards [B], of which each `group` in a row are of one prompt.

    kind: "mean", less the group's mean: the exact gradient times 1 - 1/group, since a rollout is part of its own
    baseline. "leave_one_out", less the mean of the others: the exact gradient (RLOO, arXiv 2402.14740). "std", "mean"
    over the group's standard deviation (GRPO, arXiv 2402.03300; DCoLT): prompts that are nearly solved or nearly
    hopeless count more than in the mean reward. A group of equal rewards says nothing: 0.
    """
    rows = np.asarray(reward, np.float64).reshape(-1, group)
    rest = rows - rows.mean(1, keepdims=True)
    if kind == "leave_one_out":
        rest = rest * group / (group - 1)
    elif kind == "std":
        spread = rest.std(1, keepdims=True)
        rest = rest / np.where(spread > 1e-8, spread, 1.0)
    return rest.reshape(-1).astype(np.float32)
