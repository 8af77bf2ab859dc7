"""A strategy for what a model is run on."""

from __future__ import annotations

import functools

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from qmoe_rules.feeds import Feed, random_feeds
from qmoe_rules.testing._evaluation import AnyModel, copied

__all__ = ["feeds_for"]


def feeds_for(model: AnyModel, *, min_tokens: int = 1, max_tokens: int = 8) -> SearchStrategy[Feed]:
    """Returns a strategy for inputs of a model, arrays by name as ONNX Runtime takes them.

    They are one random sequence: normally distributed where they are floating-point, rows of the
    table where they look up one; a mask, positions and an empty cache follow from the tokens.

    Args:
        model: The model; all its inputs must be known from its signature.
        min_tokens: The shortest sequence.
        max_tokens: The longest.

    Raises:
        ConfigError: What an input should be is not known.

    Example:
        >>> feeds = feeds_for(build_model(ModelDesign()))
    """
    if not 1 <= min_tokens <= max_tokens:
        raise InvalidArgument(f"min_tokens={min_tokens}, max_tokens={max_tokens}; 1 <= min <= max")
    make = functools.partial(random_feeds, copied(model))
    make(min_tokens, 0)  # says now what is not known
    return st.builds(make, st.integers(min_tokens, max_tokens), st.integers(0, 2**32 - 1))
