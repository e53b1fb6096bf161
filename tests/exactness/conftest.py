"""Makes `model_stubs` and `tiny_worlds` importable."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "contracts"))
