"""Computes the perplexity of a checkpoint on a text with our network and with transformers, over the same windows.

python tests/interop/perplexity.py CHECKPOINT TOKENIZER TEXT [--reference FOLDER_OR_GGUF ...]

CHECKPOINT is any path that `import` reads, TOKENIZER a folder with tokenizer.json, TEXT a text file, plain or .gz. The
tokens are split into windows without overlap. The first token of each window is given, the others are scored. Float32,
on the CPU.
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
    # A token has about four characters, so 16 per token are enough, and a long text is not encoded in full.
    ids = Vocabulary.load(tokenizer).encode(content[: 16 * count * length])
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens, but {count} windows of {length} need {count * length}")
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def ours(checkpoint: pathlib.Path, rows: np.ndarray, batch: int) -> np.ndarray:
    """Returns the negative log-likelihood per token in nats by our network, f64[count, length - 1]."""
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
    """Returns the same by transformers, from a folder or a GGUF file (with transformers' own reader)."""
    import torch
    import transformers

    place = {"gguf_file": reference.name} if reference.suffix == ".gguf" else {}
    folder = reference.parent if place else reference
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).eval()
    parts = []
    with torch.no_grad():
        for row in torch.tensor(rows).long():
            # In float64: PyTorch's float32 sum over 49,152 classes is off by 1e-4 nats, always in the same direction.
            log_probs = model(row[None]).logits[0, :-1].double().log_softmax(dim=-1)
            parts.append(-log_probs.gather(1, row[1:, None])[:, 0].numpy())
    return np.stack(parts)


def main() -> None:
    """Prints one line for our network and one per reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "tokenizer", "text"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--reference", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    rows = windows(arguments.tokenizer, arguments.text, arguments.windows, arguments.length)
    print(f"{rows[:, 1:].size:,} tokens scored in {arguments.windows} windows of {arguments.length}")
    mine = ours(arguments.checkpoint, rows, arguments.batch)
    print(f"{math.exp(mine.mean()):.6f}  diffusion_lm on jax {version('jax')}: {arguments.checkpoint.name}", flush=True)
    for reference in arguments.reference:
        other = theirs(reference, rows)
        name = f"transformers {version('transformers')} on torch {version('torch')}"
        apart = np.abs(mine - other).max()
        print(f"{math.exp(other.mean()):.6f}  {name}: {reference.name}; a token differs by at most {apart:.1e} nats")


if __name__ == "__main__":
    main()
