"""The rewrite where models are made: in exporters' hands, in genai folders and in Olive.

The Olive pass is in `qmoe_rules.integrations.olive`, which needs olive-ai to be installed.
"""

from __future__ import annotations

__all__ = ["quantize_exported", "quantize_genai_folder"]

from qmoe_rules.integrations.exporters import quantize_exported, quantize_genai_folder
