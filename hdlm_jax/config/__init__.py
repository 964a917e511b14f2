"""All settings: sections as frozen dataclasses, their rules, and a checked Config from what a user gives."""

from hdlm_jax.config.choices import (
    CLUSTERS,
    DETOKENIZERS,
    FORCE_TRANSITIONS,
    FORMATS,
    PACKINGS,
    PADDINGS,
    PROCESSES,
    PROTOCOLS,
    TASKS,
    TXT_DOCUMENTS,
    WEIGHTINGS,
)
from hdlm_jax.config.data import DataConfig, HierarchyConfig, TokenizerConfig, default_clusters
from hdlm_jax.config.model import DiffusionConfig, ModelConfig
from hdlm_jax.config.recipes import recipe
from hdlm_jax.config.rules import ConfigError, expand
from hdlm_jax.config.settings import PATHS, Config, change, check_name, default, inherit, resolve
from hdlm_jax.config.training import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainConfig
from hdlm_jax.config.use import EvaluateConfig, GenerateConfig, ReleasedConfig
