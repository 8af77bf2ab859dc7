"""What the reference refuses, and why."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_rules import reference
from tests.reference_runs import EXPERTS, HIDDEN, INTER, SWIGLU, Inputs, make_inputs, split_inputs

ZEROS = np.zeros
REFUSALS: list[tuple[Inputs, str]] = [
    ({"use_sparse_mixer": 1}, "use_sparse_mixer=1: sparse mixer routing is missing"),
    ({"activation_type": "relu2"}, "unknown activation_type 'relu2', not in relu, silu, "),
    ({"activation_type": "swiglu"}, r"fc1 must have shape \[6, 24, 16\], got \[6, 12, 16\]"),
    ({"k": 0}, "k must be between 1 and 6 experts, got 0"),
    ({"k": 7}, "k must be between 1 and 6 experts, got 7"),
    ({"x": ZEROS(HIDDEN)}, r"x must be 2-D or 3-D and fc2 3-D, got shapes \(16,\)"),
    ({"fc2": ZEROS((HIDDEN, INTER))}, r"fc2 3-D, got shapes \(10, 16\), \(16, 12\)"),
    ({"fc2": ZEROS((EXPERTS, INTER, HIDDEN))}, r"fc1 must have shape \[6, 16, 16\]"),
    ({"fc2": ZEROS((EXPERTS, 8, INTER))}, r"fc2 must have shape \[6, 16, 12\], got \[6, 8, 12\]"),
    (
        {"router_probs": ZEROS((9, EXPERTS))},
        r"router_probs must have shape \[10, 6\], got \[9, 6\]",
    ),
    ({"fc1_bias": ZEROS((EXPERTS, 3))}, r"fc1_bias must have shape \[6, 12\], got \[6, 3\]"),
    ({"fc2_bias": ZEROS(HIDDEN)}, r"fc2_bias must have shape \[6, 16\], got \[16\]"),
    ({"router_weights": ZEROS((2, 2))}, r"router_weights must have shape \[10, 6\], got \[2, 2\]"),
    ({"fc3_bias": ZEROS((EXPERTS, INTER))}, "fc3_bias is given without fc3"),
    ({"fc3": ZEROS((EXPERTS, INTER, HIDDEN))}, "fc3 needs activation_type swiglu, geglu or silu"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_moe_refuses(change: Inputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reference.moe(**(make_inputs(INTER) | change))


def test_moe_refuses_fc3_beside_a_fused_fc1() -> None:
    shared, parts = split_inputs()
    with pytest.raises(ValueError, match="and swiglu_fusion 0"):
        reference.moe(**shared, **parts, **SWIGLU)


@pytest.mark.parametrize(
    ("width", "keywords", "reason"),
    [
        (4, {"fusion": 0}, "need fusion 1 or 2 and an even width, got 0 and 4"),
        (3, {"fusion": 1}, "need fusion 1 or 2 and an even width, got 1 and 3"),
        (4, {"fusion": 1, "limit": -1.0}, "swiglu_limit must not be negative, got -1.0"),
    ],
)
def test_activate_refuses(width: int, keywords: Inputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reference.activate(np.zeros((2, width)), "swiglu", **keywords)


def test_route_refuses_logits_in_3d() -> None:
    with pytest.raises(ValueError, match=r"must be \[tokens, experts\], got shape \(1, 2, 3\)"):
        reference.route(np.zeros((1, 2, 3)), 1, normalize=True)
