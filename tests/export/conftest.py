"""Runs to export: the makers of tiny ones are in tests/integration, of real models with fewer layers in benchmarks."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "integration"), str(TESTS / "data"), str(TESTS.parent / "benchmarks")]
