"""What has to hold before any work begins."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import config_dict

from hdlm_jax import config
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.data.tokenizers import cutting_pattern
from hdlm_jax.decoding import presets


def resolve(given: config_dict.ConfigDict | Mapping) -> Config:
    """config.resolve, and what only the rooms above the settings know: methods' options, expressions that cut text.

    Raises:
      ConfigError: unknown names, wrong types, broken rules.
    """
    found = config.resolve(given)
    presets.check(found.generate)
    try:
        cutting_pattern(found.tokenizer.pattern)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found
