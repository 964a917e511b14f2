"""The process and the network: the sections diffusion and model."""

from __future__ import annotations

import dataclasses

from hdlm_jax.config.choices import FORCE_TRANSITIONS, PROCESSES, WEIGHTINGS
from hdlm_jax.config.rules import choice, rule


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The process and the training loss (docs/theory.md sections 2 and 3)."""

    process: str = "hierarchical"  # (MDLM with a single cluster) | gidd | sedd | autoregressive: baselines
    p_uniform: float = 0.0  # gidd: share of random words at t = 1/2
    gamma: float = 1.0  # rates (gamma, 1) for two levels
    rates: tuple[float, ...] = ()  # rates of all K levels, in place of gamma
    xi: float = 1.0  # share of tokens that go to their own cluster at the first crossing, in (1/n, 1]
    force_transition: str = "cavity"  # of predictions under a cluster: none | within | between | cavity
    weighting: str = "clip"  # of the training loss, by process (docs/theory.md "Training weights")
    weight_min: float = 0.0  # of weighting=clip
    weight_max: float = 2.0  # of weighting=clip
    hard_training: bool = False  # above level 1: -log p(token) as the loss in place of the bound's

    def check(self) -> None:
        choice("diffusion.force_transition", self.force_transition, FORCE_TRANSITIONS)
        choice("diffusion.process", self.process, PROCESSES)
        choice("diffusion.weighting", self.weighting, WEIGHTINGS[self.process])
        rule(0 <= self.p_uniform < 1, "diffusion.p_uniform", self.p_uniform, "must lie in [0, 1)")
        rule(not self.p_uniform or self.process == "gidd", "diffusion.p_uniform", self.p_uniform,
              f"goes with diffusion.process='gidd', not {self.process!r}")
        plain = self.process == "hierarchical" or (self.xi, self.hard_training, self.rates, self.gamma) == (
            1, False, (), 1)
        rule(plain, "diffusion.process", self.process, "knows no xi, hard_training, rates or gamma; leave them out")
        rule(self.gamma > 0, "diffusion.gamma", self.gamma, "must be positive")
        rule(not self.rates or self.gamma == 1, "diffusion.rates", self.rates,
              "only one of diffusion.gamma and diffusion.rates should be given")
        rule(all(r > 0 for r in self.rates), "diffusion.rates", self.rates, "must be positive")
        rule(0 < self.xi <= 1, "diffusion.xi", self.xi, "must lie in (1/n, 1]")
        rule(0 <= self.weight_min <= self.weight_max, "diffusion.weight_max", self.weight_max,
              f"must be at least diffusion.weight_min={self.weight_min}, and that at least 0")
        rule(self.xi == 1 or self.force_transition != "within", "diffusion.force_transition", "within",
              f"its bound is infinite at xi={self.xi}: choose none, between or cavity")

    def level_rates(self, levels: int) -> tuple[float, ...]:
        """Rates of the K levels, scaled so that the smallest is 1 (a common factor only relabels time)."""
        rates = self.rates or ((self.gamma, 1.0) if levels == 2 else (1.0,) * levels)
        rule(len(rates) == levels, "diffusion.rates", rates, f"the hierarchy has {levels} levels and needs as many")
        rule(self.gamma == 1 or levels <= 2, "diffusion.gamma", self.gamma,
              f"stands for two levels; give diffusion.rates for the {levels} of this hierarchy")
        return tuple(r / min(rates) for r in rates)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The published transformer; defaults are its small size."""

    width: int = 768  # D
    blocks: int = 12  # transformer blocks
    heads: int = 12  # of attention
    seq_len: int = 512  # S, tokens of a row
    dropout: float = 0.0  # in the blocks, as published
    time_conditioning: bool = True  # whether the network is told t
    head: str = "flat"  # flat: a logit for every word | factorised: p(cluster) p(word | cluster), needs clusters
    prototypes: int = 8  # vectors a cluster, factorised head
    embeddings: str = "random"  # random | clusters: start from the embeddings the words were clustered by
    dtype: str = "float32"  # of the computation; parameters and logits are float32
    remat: str = "auto"  # recomputed in the backward pass: none | cheap (all but products) | all | auto by backend

    def check(self) -> None:
        choice("model.head", self.head, ("flat", "factorised"))
        choice("model.remat", self.remat, ("auto", "none", "cheap", "all"))
        choice("model.embeddings", self.embeddings, ("random", "clusters"))
        choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("width", "blocks", "heads", "seq_len", "prototypes"):
            rule(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        rule(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        rule(self.width // self.heads % 2 == 0, "model.heads", self.heads,
              f"model.width/model.heads = {self.width / self.heads:g} must be even (rotary embedding)")
        rule(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
