"""Tiny runs to open: the makers stand in tests/integration."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
