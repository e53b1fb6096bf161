"""T5 as T5X stores it: names of `t5x/examples/t5/network.py`, kernels [in, out].

There is no config.json, so the sizes are read from the shapes of the tensors.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.gin_text import one_line
from diffusion_lm.interop.name_maps.family import (
    CONV_HEADS_IN,
    CONV_HEADS_OUT,
    TRANSPOSE,
    VOCABULARY,
    CheckpointConfig,
    Family,
    SpecFields,
    Transform,
    Weight,
)
from diffusion_lm.interop.name_maps.t5 import T5
from diffusion_lm.interop.t5x_files import BIAS

OPERATIVE = "config.gin"
"""The gin file that T5X writes next to its checkpoints."""

_HEAD = "decoder.logits_dense.kernel"
_VOCABULARY_LAST = Transform(lambda x, spec: x.T, lambda x, spec: x[: spec.vocab_size].T)
_FEED_FORWARD = {
    ("gelu", "linear"): "gated-gelu",
    ("silu", "linear"): "gated-silu",
    ("swish", "linear"): "gated-silu",
    ("relu",): "relu",
    ("gelu",): "gelu_new",
}
_ACTIVATIONS = re.compile(r"^[ \t\w./]*\bmlp_activations\s*=[\s\\]*(\(.*?\)|\[.*?\])", re.MULTILINE | re.DOTALL)


def _stack(path: str, stack: str, attentions: Mapping[str, str]) -> Iterator[Weight]:
    """Yields the lines of the encoder or the decoder."""
    layer = f"{stack}.layers_{{i}}."
    yield Weight(f"{path}relative_bias", f"{stack}.{BIAS}", TRANSPOSE)
    yield Weight(f"{path}blocks/attention/relative_bias", f"{layer}{BIAS}", TRANSPOSE)
    for name, module in attentions.items():
        norm = module.replace("encoder_decoder", "cross")
        yield Weight(f"{path}blocks/{name}_norm/scale", f"{layer}pre_{norm}_layer_norm.scale")
        for array in ("query", "key", "value"):
            yield Weight(f"{path}blocks/{name}/{array}", f"{layer}{module}.{array}.kernel", CONV_HEADS_OUT)
        yield Weight(f"{path}blocks/{name}/output", f"{layer}{module}.out.kernel", CONV_HEADS_IN)
    yield Weight(f"{path}blocks/mlp_norm/scale", f"{layer}pre_mlp_layer_norm.scale")
    yield Weight(f"{path}blocks/mlp/gate", f"{layer}mlp.wi_0.kernel", gated=True)
    yield Weight(f"{path}blocks/mlp/up", f"{layer}mlp.wi_1.kernel", gated=True)
    yield Weight(f"{path}blocks/mlp/up", f"{layer}mlp.wi.kernel", gated=False)
    yield Weight(f"{path}blocks/mlp/down", f"{layer}mlp.wo.kernel")
    yield Weight(f"{path}final_norm/scale", f"{stack}.{stack}_norm.scale")


def read_sizes(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Any]:
    """Returns the config.json that Hugging Face would have for the network of these tensors.

    The number of heads is the number of rows of the relative bias; a second input matrix (`wi_0`, `wi_1`) is a gate.
    The activation shows in no shape. It is read from `config.gin` in the folder or its parent. Without such a file it
    is T5's own: GELU with a gate, ReLU without one.

    Args:
      shapes: of all tensors, by name.
      folder: folder of the checkpoint.

    Raises:
      ConfigError: a tensor that gives a size is missing, or the network does not have the activation.
    """
    vocabulary, width = _shape(shapes, "token_embedder.embedding")
    per_layer = f"encoder.{BIAS}" not in shapes and f"encoder.layers_0.{BIAS}" in shapes
    bias = f"encoder.layers_0.{BIAS}" if per_layer else f"encoder.{BIAS}"
    heads, buckets = _shape(shapes, bias)
    queries = _shape(shapes, "encoder.layers_0.attention.query.kernel")[1]
    gated = "encoder.layers_0.mlp.wi_0.kernel" in shapes
    if queries % heads:
        raise ConfigError(
            f"'encoder.layers_0.attention.query.kernel' has {queries} columns for the {heads} heads of {bias!r}",
            where=str(folder),
            fix="Use a checkpoint whose tensors belong to one network.",
        )
    return dict(
        model_type="umt5" if per_layer else "t5",
        vocab_size=vocabulary,
        d_model=width,
        num_heads=heads,
        d_kv=queries // heads,
        d_ff=_shape(shapes, "encoder.layers_0.mlp.wo.kernel")[0],
        num_layers=_layers(shapes, "encoder"),
        num_decoder_layers=_layers(shapes, "decoder"),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj=_activation(folder) or ("gated-gelu" if gated else "relu"),
        tie_word_embeddings=_HEAD not in shapes,
        is_encoder_decoder=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != 2:
        found = f"has shape {list(shape)} instead of two axes" if name in shapes else "is missing"
        raise ConfigError(
            f"tensor {name!r} {found}; the sizes of a T5X checkpoint are read from it",
            where="PATH",
            fix="Use a complete checkpoint of t5x/examples/t5.",
        )
    return shape


def _layers(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    found = (re.match(rf"{stack}\.layers_(\d+)\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _activation(folder: Path) -> str | None:
    """Returns `feed_forward_proj` from `mlp_activations` of the run's gin file; None if there is no such file."""
    for file in (folder / OPERATIVE, folder.parent / OPERATIVE):
        found = _ACTIVATIONS.findall(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else []
        if not found:
            continue
        try:
            names = tuple(ast.literal_eval(found[-1]))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            names = (found[-1],)
        # The file may be hostile: its text is parsed as a literal and compared, never executed.
        if not all(isinstance(name, str) for name in names) or names not in _FEED_FORWARD:
            raise ConfigError(
                f"{file.name}: mlp_activations = {one_line(found[-1])[:80]} is not supported "
                f"(supported: {', '.join(map(str, _FEED_FORWARD))})",
                where=str(file),
                fix="Use another checkpoint.",
            )
        return _FEED_FORWARD[names]
    return None


def _read_config(config: CheckpointConfig) -> SpecFields:
    return T5.read_config(config) | {"relative_per_layer": config.get("model_type") == "umt5"}


T5X = Family(
    name="t5x",
    description="T5, mT5 and umT5 as T5X stores them",
    source=T5.source,
    model_types=(),
    architectures=T5.architectures,
    prefix="",
    weights=(
        Weight("embed/tokens", "token_embedder.embedding", VOCABULARY),
        *_stack("encoder/", "encoder", {"attention": "attention"}),
        *_stack("", "decoder", {"attention": "self_attention", "cross_attention": "encoder_decoder_attention"}),
        Weight("head/tokens", _HEAD, _VOCABULARY_LAST),
    ),
    read_config=_read_config,
    write_config=T5.write_config,
    keys=T5.keys,
    ignored_keys=T5.ignored_keys,
    shape_source="the rest of the checkpoint",
)
