"""Plain `pytest` does not collect these: they download a model of 253 MB."""

from __future__ import annotations

import os

from conftest import workspace

__all__ = ["workspace"]

collect_ignore = [] if "RKCACHED_ARCHITECTURES" in os.environ else ["test_gemma.py"]
