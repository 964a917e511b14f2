"""The recipe of a run that is there: main gives it as --config=of_run.py:WORKDIR where no other is named."""

from ml_collections import config_dict

from hdlm_jax.training import loading


def get_config(workdir: str) -> config_dict.ConfigDict:
    """The settings the run was trained with, to override as those of any recipe."""
    return config_dict.ConfigDict(loading.saved_config(workdir).as_dict())
