"""ml_dtypes: casts to small float formats, as JAX, TensorFlow and the ONNX reference have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .paths import Path

PACKAGES = {"ml_dtypes": "engines"}
FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
PATHS = (Path("ml_dtypes", "ml_dtypes", "cast", "ml_dtypes", tuple(FORMATS)),)


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Codes of x in the format."""
    kind = getattr(need("ml_dtypes", "engines", "engine ml_dtypes"), FORMATS[values["format"]])
    with np.errstate(all="ignore"):
        return {"code": values["x"].astype(kind).view(np.uint8)}
