"""Writes the fixtures of `huggingface_golden_test.py` and `t5_golden_test.py`; needs torch and transformers.

python tests/golden/make_huggingface.py     (in the environment that `make test-interop` makes)
"""

import pathlib
import shutil
import sys

import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import huggingface_cases as cases
import t5_cases


def main() -> None:
    """Writes a folder per case: the checkpoint as transformers saves it, and golden.safetensors."""
    shutil.rmtree(cases.FOLDER, ignore_errors=True)
    for name in cases.GOLDEN:
        folder = cases.FOLDER / name
        model = cases.build(name)
        model.save_pretrained(folder)
        encoder = type(model).__name__.endswith("MaskedLM")
        ids, mask = cases.inputs(model.config.pad_token_id if encoder else None)
        logits = cases.reference(model, ids, mask)
        save_file({"ids": ids, "mask": mask, "logits": logits}, folder / "golden.safetensors")
    for name in t5_cases.GOLDEN:
        model, arrays = t5_cases.build(name), t5_cases.inputs()
        model.save_pretrained(cases.FOLDER / name)
        save_file(arrays | {"logits": t5_cases.reference(model, arrays)}, cases.FOLDER / name / "golden.safetensors")
    # What `TorchFile` has to read: 32 and 16 bits, shared storages, strides, a parameter, an empty tensor.
    table = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "table": table,
        "columns": table.T[1:3],
        "half": table[1:, ::2].half(),
        "bfloat16": table.bfloat16(),
        "parameter": torch.nn.Parameter(table[0]),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(7),
    }
    torch.save(tensors, cases.FOLDER / "weights.bin")
    size = sum(path.stat().st_size for path in cases.FOLDER.rglob("*") if path.is_file())
    print(f"{len(cases.GOLDEN) + len(t5_cases.GOLDEN)} cases, {size / 1024:.0f} KiB in {cases.FOLDER}")


if __name__ == "__main__":
    main()
