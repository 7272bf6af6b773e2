"""Runs the tests of tests/, a file for each module: `python unittests.py` or `pytest unittests.py`, with
pytest's options. Without `-m ""` those marked slow are left out.
"""

import importlib
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))  # which imports this file again

rooms = [f"tests.{path.stem}" for path in sorted(Path(__file__).parent.glob("tests/test_*.py"))]
pytest.register_assert_rewrite(*rooms)
from tests.conftest import *  # noqa: E402, F403 (its fixtures)

for room in rooms:
    for name, test in vars(importlib.import_module(room)).items():
        if name.startswith("test_"):
            if name in globals():
                raise ImportError(f"{room}: another file has a {name} too, and one would hide the other")
            globals()[name] = test
