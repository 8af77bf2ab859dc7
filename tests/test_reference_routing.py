"""The routing of the reference: ties, masked experts, weights apart from logits."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_rules import reference
from tests.reference_runs import HIDDEN, INTER, TIES, check_moe, make_inputs


def test_ties_go_to_the_higher_expert() -> None:
    indices, _ = reference.route(TIES, 2, normalize=False)
    assert indices.tolist() == [[5, 4], [2, 1], [3, 1]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [0, 1])
def test_ties_match_onnxruntime(normalize: int, k: int) -> None:
    inputs = make_inputs(INTER, shape=(len(TIES), HIDDEN)) | {"router_probs": TIES}
    attributes = {"activation_type": "silu", "k": k, "normalize_routing_weights": normalize}
    check_moe(inputs, attributes)


def test_masked_experts_weigh_nothing() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, -np.inf, -np.inf, -np.inf]], np.float32)
    inputs = make_inputs(INTER, shape=(1, HIDDEN)) | {"router_probs": logits}
    for normalize in (0, 1):
        check_moe(
            inputs,
            {"activation_type": "silu", "k": 3, "normalize_routing_weights": normalize},
        )


def test_router_weights_mix_and_logits_choose() -> None:
    logits = np.array([[3.0, 1.0, 2.0]])
    mixing = np.array([[0.25, 0.9, 0.75]])
    indices, weights = reference.route(logits, 2, normalize=False, router_weights=mixing)
    assert indices.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.25, 0.75]]
    _, weights = reference.route(logits, 2, normalize=True, router_weights=2 * mixing)
    np.testing.assert_allclose(weights, [[0.25, 0.75]])


def test_qmoe_all_zero_router_weights_stay_zero() -> None:
    indices, weights = reference.route(TIES, 2, normalize=True, router_weights=np.zeros_like(TIES))
    assert indices.shape == (3, 2)
    assert not weights.any()
