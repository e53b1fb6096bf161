"""Perplexity of one checkpoint on one text, by our network and by transformers, over the same windows.

python tests/interop/perplexity.py CHECKPOINT TOKENIZER TEXT [--reference FOLDER_OR_GGUF ...]

CHECKPOINT is what `import` reads, TOKENIZER a folder with tokenizer.json, TEXT a text file, plain or .gz. The tokens
are cut into windows without overlap; the first token of each is given, the others are scored. Float32, on the CPU.
"""

import argparse
import gzip
import math
import pathlib
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.interop.huggingface import load
from diffusion_lm.nn.masks import Causal


def windows(tokenizer: pathlib.Path, text: pathlib.Path, count: int, length: int) -> np.ndarray:
    """Returns the first `count` windows of the text, i32[count, length]."""
    data = text.read_bytes()
    content = (gzip.decompress(data) if text.suffix == ".gz" else data).decode()
    # A token has four characters on average, so this is more than enough, and not all of a long text.
    ids = Vocabulary.load(tokenizer).encode(content[: 16 * count * length])
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens and {count} windows of {length} need {count * length}")
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def ours(checkpoint: pathlib.Path, rows: np.ndarray, batch: int) -> np.ndarray:
    """Returns nats, f64[count, length - 1]."""
    imported = load(checkpoint)

    @jax.jit
    def nats(params, tokens):
        model = BoundModel(imported.architecture, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, visibility=Causal(), positions=positions, segment_ids=jnp.ones_like(tokens))
        return model.nll(hidden, jnp.roll(tokens, -1, axis=1))[:, :-1]

    parts = [nats(imported.params, jnp.asarray(rows[at : at + batch])) for at in range(0, len(rows), batch)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def theirs(reference: pathlib.Path, rows: np.ndarray) -> np.ndarray:
    """Returns the same by transformers, which reads a folder or, with its own reader, a GGUF file."""
    import torch
    import transformers

    place = {"gguf_file": reference.name} if reference.suffix == ".gguf" else {}
    folder = reference.parent if place else reference
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).eval()
    parts = []
    with torch.no_grad():
        for row in torch.tensor(rows).long():
            # In float64: PyTorch's float32 sum over 49,152 classes is off by 1e-4 nats, always to the same side.
            log_probs = model(row[None]).logits[0, :-1].double().log_softmax(dim=-1)
            parts.append(-log_probs.gather(1, row[1:, None])[:, 0].numpy())
    return np.stack(parts)


def main() -> None:
    """Prints a line for us and one for each reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "tokenizer", "text"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--reference", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    rows = windows(given.tokenizer, given.text, given.windows, given.length)
    print(f"{rows[:, 1:].size:,} tokens scored in {given.windows} windows of {given.length}")
    mine = ours(given.checkpoint, rows, given.batch)
    print(f"{math.exp(mine.mean()):.6f}  diffusion_lm on jax {version('jax')}: {given.checkpoint.name}", flush=True)
    for reference in given.reference:
        other = theirs(reference, rows)
        name = f"transformers {version('transformers')} on torch {version('torch')}"
        apart = np.abs(mine - other).max()
        print(f"{math.exp(other.mean()):.6f}  {name}: {reference.name}; a token differs by at most {apart:.1e} nats")


if __name__ == "__main__":
    main()
