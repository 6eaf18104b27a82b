"""nuciseg trains, searches and runs networks that separate touching nuclei.

import nuciseg
nuclei = nuciseg.predict(image)  # labels_HW, confidences_N
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Importing nuciseg stays quick and without side effects; the module nuciseg.predict can be called.
    if name == "predict":
        return importlib.import_module("nuciseg.predict")
    raise AttributeError(f"module 'nuciseg' has no attribute {name!r}")
