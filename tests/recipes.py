"""Which fields a recipe can have together."""

from __future__ import annotations

from typing import Any

from qmoe_rules.errors import ConfigError
from qmoe_rules.recipe import Recipe


def is_recipe(**fields: Any) -> bool:
    try:
        Recipe(**fields)
    except ConfigError:
        return False
    return True
