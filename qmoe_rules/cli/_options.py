"""The recipe, and how a model is saved, as options of a command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qmoe_rules.errors import SaveError
from qmoe_rules.feeds import TOKEN_DTYPES
from qmoe_rules.options import OPTIONS
from qmoe_rules.pages import check_page
from qmoe_rules.recipe import Recipe
from qmoe_rules.sizes import parse_bytes

__all__ = [
    "DATA",
    "add_data_options",
    "add_html_option",
    "add_recipe_options",
    "add_save_options",
    "byte_count",
    "page_file",
    "positive_number",
    "recipe_of",
    "save_options_of",
]

DATA = (
    "tokens as raw numbers, one axis of a .npy, or arrays of samples: .npy, or .npz and "
    ".safetensors by input name"
)
"""What a file of data may be, in words."""

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
            continue
        settings: dict[str, Any] = {"type": option.kind, "default": option.default}
        if option.kind is list:
            settings = {"action": "append", "default": []}
        shown = option.shown or "{" + ",".join(map(str, option.choices)) + "}"
        group.add_argument(flag, dest=option.name, metavar=shown, help=option.help, **settings)
    command.add_argument(
        "--fail-if-skipped",
        action="store_true",
        help="exit 1, and write nothing, if a MoE is skipped (excluded ones too) or none is found",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe that parsed arguments ask for."""
    return Recipe.of(**{option.name: getattr(arguments, option.name) for option in OPTIONS})


def add_data_options(command: argparse.ArgumentParser, what: str) -> None:
    """Adds the options of how a file of tokens is read, with what a window is."""
    command.add_argument(
        "--window",
        type=positive_number,
        default=256,
        metavar="N",
        help=f"{what}, of a file of tokens only (default: 256)",
    )
    command.add_argument(
        "--dtype",
        default="uint8",
        choices=TOKEN_DTYPES,
        metavar="{" + ",".join(TOKEN_DTYPES) + "}",
        help="the numbers in a raw file of tokens; others say it themselves (default: uint8)",
    )


def add_html_option(command: argparse.ArgumentParser, text: str) -> None:
    """Adds `--html`, with what it says."""
    command.add_argument("--html", type=page_file, metavar="FILE", help=text)


def add_save_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of how a model is saved."""
    group = command.add_argument_group("saving")
    group.add_argument(
        "--workers",
        type=positive_number,
        metavar="N",
        help="threads, or tasks of the Dask cluster at a time (default: all there are)",
    )
    group.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="let the Dask cluster of this scheduler compute; its workers see the same files",
    )
    group.add_argument(
        "--max-shard-size",
        type=byte_count,
        metavar="SIZE",
        help="begin another data file after this many bytes, like 2GB or 500MiB (default: never)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="if this is interrupted keep what is written, and go on from what was kept before",
    )


@contextmanager
def save_options_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields what parsed arguments ask for, as arguments of `quantize`."""
    options = {name: getattr(arguments, name) for name in ("workers", "max_shard_size", "resume")}
    try:
        if arguments.dask is None:
            yield options
            return
        from qmoe_rules.integrations.dask import cluster

        with cluster(arguments.dask) as (executor, threads):
            yield {**options, "executor": executor, "workers": arguments.workers or threads}
    except KeyboardInterrupt as interrupt:
        if arguments.resume and not interrupt.args:  # which say what is written already
            raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
        raise


def positive_number(text: str) -> int:
    """Returns the number that a text spells."""
    if not re.fullmatch("0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def page_file(text: str) -> str:
    """Returns the name of a page; nothing but a page may be called so, no model at any rate."""
    try:
        check_page(text)
    except SaveError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def byte_count(text: str) -> int:
    """Returns the bytes that a text spells: a number and a unit, of 1000s or, with an i, 1024s."""
    size = parse_bytes(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB, 500MiB or 1000000")
    return size
