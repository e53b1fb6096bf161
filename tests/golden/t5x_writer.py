"""Writes the weights of a Hugging Face T5 the way T5X writes checkpoints, in the layouts that are about."""

import pathlib
import re

import flax.serialization
import numpy as np
import tensorstore

LAYOUTS = ("unscanned", "scalable_t5", "flaxformer")
"""t5x/examples/t5; t5x/examples/scalable_t5, scanned; Flaxformer's scan, which keeps heads and head size apart."""

_MODULES = {
    "encoder": {"0": "attention", "1": "mlp"},
    "decoder": {"0": "self_attention", "1": "encoder_decoder_attention", "2": "mlp"},
}
_NORMS = {"encoder_decoder_attention": "cross_attention"}
_KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _layer_name(stack: str, sublayer: str, rest: str) -> str:
    module = _MODULES[stack][sublayer]
    if rest == "layer_norm":
        return f"pre_{_NORMS.get(module, module)}_layer_norm.scale"
    return f"{module}.{_KERNELS.get(rest.rpartition('.')[2], rest.rpartition('.')[2])}.kernel"


def renamed(tensors: dict[str, np.ndarray], layout: str, head_dim: int, own_biases: bool = False) -> dict:
    """Returns T5X's arrays by dotted name.

    Args:
      tensors: of the Hugging Face file.
      layout: one of `LAYOUTS`.
      head_dim: E.
      own_biases: repeats a stack's relative bias in each layer, as a scan does; those of umT5 are in each anyway.
    """
    found: dict[str, np.ndarray] = {"token_embedder.embedding": tensors["shared.weight"]}
    layers: dict[tuple[str, str], list[np.ndarray]] = {}
    if "lm_head.weight" in tensors:
        found["decoder.logits_dense.kernel"] = tensors["lm_head.weight"].T
    for stack in ("encoder", "decoder"):
        found[f"{stack}.{stack}_norm.scale"] = tensors[f"{stack}.final_layer_norm.weight"]
        depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(rf"{stack}\.block\.(\d+)", name)))
        called = f"{stack}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight"
        biases = [tensors[name].T for i in range(depth) if (name := called.format(i)) in tensors]
        if own_biases or len(biases) > 1:
            name = "relative_posemb" if layout == "scalable_t5" else "relpos_bias"
            layers[stack, f"{name}.rel_embedding"] = biases if len(biases) > 1 else biases * depth
        else:
            found[f"{stack}.relpos_bias.rel_embedding"] = biases[0]
        for layer in range(depth):
            for name, tensor in tensors.items():
                match = re.fullmatch(rf"{stack}\.block\.{layer}\.layer\.(\d)\.(.+)\.weight", name)
                if match is None or "relative" in name:
                    continue
                theirs = _layer_name(stack, match[1], match[2])
                kernel = tensor.T
                if layout == "flaxformer" and ".out." in theirs:
                    kernel = kernel.reshape(-1, head_dim, kernel.shape[1])
                elif layout == "flaxformer" and "attention." in theirs:
                    kernel = kernel.reshape(kernel.shape[0], -1, head_dim)
                layers.setdefault((stack, theirs), []).append(kernel)
    for (stack, name), arrays in layers.items():
        if layout == "unscanned":
            found |= {f"{stack}.layers_{i}.{name}": array for i, array in enumerate(arrays)}
        else:
            inner = "layers" if layout == "scalable_t5" else stack
            found[f"{stack}.{inner}.{name}"] = np.stack(arrays, axis=1)
    return found


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray], inline: tuple[str, ...] = (), dtype=None) -> None:
    """Writes the msgpack index and one zarr folder an array; those in `inline` go into the index itself."""
    folder.mkdir(parents=True)
    target: dict = {}
    for name, array in arrays.items():
        if name in inline:
            leaf: object = np.ascontiguousarray(array)
        else:
            stored = dtype or array.dtype.name
            metadata = {"compressor": {"id": "gzip"}, "shape": list(array.shape), "chunks": list(array.shape)}
            leaf = {"driver": "zarr", "dtype": stored, "metadata": metadata}
            place = f"target.{name}"
            opened = tensorstore.open(
                leaf | {"kvstore": {"driver": "file", "path": str(folder / place)}}, create=True, open=True
            ).result()
            opened.write(array.astype(opened.dtype.numpy_dtype)).result()
            # T5X writes paths relative to the index, and the driver of the place where it ran.
            leaf = leaf | {"kvstore": {"driver": "gfile", "path": place}}
        branch = target
        *parents, last = name.split(".")
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    state = {"step": 1000, "param_states": {}}
    index = {"version": 3, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))
