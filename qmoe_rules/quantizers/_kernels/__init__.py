"""The compiled engine. Importing it imports numba: `engine.kernels` does so when it is needed."""

from __future__ import annotations

from qmoe_rules.quantizers._kernels.feeding import descend, feed
from qmoe_rules.quantizers._kernels.permuting import load_tiles, store_tiles, transpose_nibbles
from qmoe_rules.quantizers._kernels.rounding import block_peaks, round_floats, round_integers
from qmoe_rules.quantizers._kernels.searching import encode_rows, fit, least_error, measure

__all__ = [
    "block_peaks",
    "descend",
    "encode_rows",
    "feed",
    "fit",
    "least_error",
    "load_tiles",
    "measure",
    "round_floats",
    "round_integers",
    "store_tiles",
    "transpose_nibbles",
]
