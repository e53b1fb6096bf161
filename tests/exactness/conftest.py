"""Makes `model_stubs` and `tiny_world` importable."""

import pathlib
import sys

for folder in (pathlib.Path(__file__).parents[1] / "contracts", pathlib.Path(__file__).parent):
    sys.path.insert(0, str(folder))
