"""A network and a process from a config."""

from __future__ import annotations

from typing import Any

from hdlm_jax.config import Config
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.sedd import SeddProcess
from hdlm_jax.models.network import Network, make_network


def make_process(config: Config, hierarchy: Hierarchy) -> Any:
    """The process of config.diffusion.process: hierarchical, gidd, sedd or autoregressive."""
    d = config.diffusion
    if d.process == "autoregressive":
        return AutoregressiveProcess(hierarchy)
    if d.process == "gidd":
        return GiddProcess(hierarchy, d.p_uniform)
    chain = LevelChain(d.level_rates(hierarchy.num_levels))
    return (SeddProcess if d.process == "sedd" else HierarchicalProcess)(hierarchy, chain, d.xi, d.force_transition)


def build(config: Config, hierarchy: Hierarchy) -> tuple[Network, Any]:
    """(network, process) of a config and hierarchy."""
    return make_network(config, hierarchy), make_process(config, hierarchy)
