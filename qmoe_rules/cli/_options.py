"""The recipe as options of a command."""

from __future__ import annotations

import argparse

from qmoe_rules.options import OPTIONS
from qmoe_rules.recipe import Recipe

__all__ = ["add_recipe_options", "recipe_of"]

_RENAMED = {"nodes_to_exclude": "--exclude", "overrides": "--override"}


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    """Adds one option per field of the recipe, and `--fail-if-skipped`."""
    group = command.add_argument_group("recipe")
    for option in OPTIONS:
        flag = _RENAMED.get(option.name, f"--{option.name.replace('_', '-')}")
        if option.kind is bool:
            group.add_argument(
                "--asymmetric", dest=option.name, action="store_false", help="store zero points"
            )
        elif option.kind is list:
            group.add_argument(
                flag,
                dest=option.name,
                action="append",
                default=[],
                metavar="PATTERN" if "PATTERN" in option.help else "PATTERN:FIELD=VALUE,...",
                help=option.help,
            )
        else:
            shown = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else "B"
            group.add_argument(
                flag, type=option.kind, default=option.default, metavar=shown, help=option.help
            )
    command.add_argument(
        "--fail-if-skipped",
        action="store_true",
        help="exit 1, and write nothing, if a MoE is skipped (excluded ones too) or none is found",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe that parsed arguments ask for."""
    return Recipe.of(**{option.name: getattr(arguments, option.name) for option in OPTIONS})
