"""Plain `pytest` does not collect the corpus: it downloads, and needs the referee."""

from __future__ import annotations

import os

collect_ignore = [] if "RKCACHED_CORPUS" in os.environ else ["test_corpus.py"]
