"""Recipes by name: files of configs/, which are installed with the package."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from ml_collections import config_dict

from hdlm_jax.config.rules import choice

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Where the recipes lie: inside an installed package, else beside it."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """All recipes there are."""
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def path_of(given: str) -> str:
    """FILE.py of a recipe given by name or as a file, its argument (behind a colon) kept: "books:mdlm".

    Raises:
      ConfigError: no recipe of that name; it lists them all.
    """
    name, colon, argument = given.partition(":")
    if name.endswith(".py") or os.path.dirname(name):
        return given
    choice("--config", name, names())
    return f"{folder() / name}.py{colon}{argument}"


def recipe(name: str, *arguments: str) -> config_dict.ConfigDict:
    """What the recipe of that name gives: the ground that another one changes.

    Raises:
      ConfigError: no recipe of that name.
    """
    return runpy.run_path(path_of(name))["get_config"](*arguments)
