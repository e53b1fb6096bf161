"""Makes `model_stubs` and the golden checkpoints importable."""

import pathlib
import sys

for folder in ("contracts", "golden"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))
