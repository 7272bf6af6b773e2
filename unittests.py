"""Gathers the tests of tests/, a file a room: `python unittests.py` or `pytest unittests.py`, with pytest's
options.
"""

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import *  # noqa: F403 (the fixtures)

rooms = [f"tests.{path.stem}" for path in sorted(Path(__file__).parent.glob("tests/test_*.py"))]
pytest.register_assert_rewrite(*rooms)
for room in rooms:
    for name, test in vars(importlib.import_module(room)).items():
        if name.startswith("test_"):
            if name in globals():
                raise ImportError(f"{room}: another file has a {name} too, and one would hide the other")
            globals()[name] = test

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
