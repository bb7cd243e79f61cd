"""PyTorch models in and out: `from_torch` gives a Flax model with sites, `to_torch` sends the grown model back.

Only `from_torch`, `to_torch`, `spec_of`, `regrow` and `register_twin` need torch (`pip install 'esper_jax[torch]'`).
"""

from __future__ import annotations

import importlib
from typing import Any

from .graph import BridgeError, Graph
from .hlo import to_stablehlo
from .load import load_imported, load_weights
from .module import Imported
from .nnx import to_nnx
from .ops import register_op, supported_ops

_NEED_TORCH = {
    "Import": "torch_in",
    "Report": "comparison",
    "from_torch": "torch_in",
    "register_twin": "torch_seeds",
    "regrow": "torch_seeds",
    "spec_of": "torch_out",
    "to_torch": "torch_out",
    "verify": "comparison",
}

__all__ = [
    "BridgeError",
    "Graph",
    "Import",
    "Imported",
    "Report",
    "from_torch",
    "load_imported",
    "load_weights",
    "register_op",
    "register_twin",
    "regrow",
    "spec_of",
    "supported_ops",
    "to_nnx",
    "to_stablehlo",
    "to_torch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(f"esper_jax.bridge.{name} needs PyTorch: pip install 'esper_jax[torch]'") from error
    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
