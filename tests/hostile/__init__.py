"""Models that mean harm, or were harmed: small, made by code, each with what becomes of it.

Every case begins with the same good model of one MoE node, `model.onnx` and `model.onnx.data` in a
folder of their own, and spoils it. Beside that folder lies `outside`, which nobody may read.
"""

from tests.hostile import _attributes, _files, _graphs, _sizes  # noqa: F401 (they add cases)
from tests.hostile._cases import CASES, EXPERTS, SECRET, Case, good_model
from tests.hostile._names import NAMES

__all__ = ["CASES", "EXPERTS", "NAMES", "SECRET", "Case", "good_model"]
