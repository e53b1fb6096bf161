"""Makes `training_stubs` and `train_process` importable."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "training")]
