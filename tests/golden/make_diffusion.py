"""Writes the fixtures of `diffusion_golden_test.py`; needs torch and transformers.

python tests/golden/make_diffusion.py     (in the environment that `make test-interop` makes)
"""

import json
import pathlib
import shutil
import sys

from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import diffusion_cases as cases


def main() -> None:
    """Writes a folder per case: the checkpoint as it would be published, and golden.safetensors."""
    shutil.rmtree(cases.FOLDER, ignore_errors=True)
    for name, case in cases.CASES.items():
        folder, model = cases.FOLDER / name, cases.build(name)
        write(folder, name, model)
        logits = cases.reference(model, cases.ids(), cases.seen(case.block))
        save_file({"ids": cases.ids(), "logits": logits}, folder / "golden.safetensors")
    size = sum(path.stat().st_size for path in cases.FOLDER.rglob("*") if path.is_file())
    print(f"{len(cases.CASES)} cases, {size / 1024:.0f} KiB in {cases.FOLDER}")


def write(folder: pathlib.Path, name: str, model) -> None:
    """Writes the checkpoint of a case."""
    folder.mkdir(parents=True)
    save_file(cases.tensors(name, model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(cases.config(name, model), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
