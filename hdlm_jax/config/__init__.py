"""All settings: sections as frozen dataclasses, their rules, and a checked Config from what a user gives."""

from hdlm_jax.config.recipes import recipe
from hdlm_jax.config.rules import ConfigError, check_local, expand
from hdlm_jax.config.sections import (
    ASIDE,
    CLUSTERS,
    DETOKENIZERS,
    FORCE_TRANSITIONS,
    LATENT_METHODS,
    LESSONS,
    OWN_ANSWERS,
    PACKINGS,
    PADDINGS,
    REWARDS,
    TUNINGS,
    WEIGHTINGS,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DiffusionConfig,
    EvaluateConfig,
    GenerateConfig,
    HierarchyConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReleasedConfig,
    ServeConfig,
    TokenizerConfig,
    TrainConfig,
    TuneConfig,
    default_clusters,
)
from hdlm_jax.config.settings import PATHS, Config, change, check_name, default, inherit, resolve
