"""The mesh axes over which each logical axis is split: a dataclass with one field per logical axis.

Parameters and activations have different names where their shardings differ: `embed` is the model axis of a stored
parameter (sharded by FSDP), `activation_embed` the model axis of a hidden state (replicated by default).
"""

import dataclasses

from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class LogicalRules:
    """Mesh axes of each logical axis: a name, several names (outermost first), or None for not split.

    The defaults are FSDP with tensor parallelism. Mesh axes of size 1 have no effect, so the same rules work on one
    device, with pure data parallelism and on a pod.

    Attributes:
      batch: rows of a batch.
      length: tokens of a row.
      embed: model width of parameters.
      mlp: feed-forward width, of parameters and activations.
      heads: query heads, of parameters and activations.
      kv_heads: key/value heads.
      head_dim: size of one head.
      vocab: rows of the vocabulary, padded ones included.
      layers: the stacked layers.
      relative_buckets: buckets of the relative position bias.
      positions: rows of a learned position table.
      norm: the scale of a norm; small, so replicated by default.
      activation_embed: model width of hidden states.
    """

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = "sequence"
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    vocab: MeshAxes = "tensor"
    layers: MeshAxes = None
    relative_buckets: MeshAxes = None
    positions: MeshAxes = None
    norm: MeshAxes = None
    activation_embed: MeshAxes = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            axes = (value,) if isinstance(value, str) else tuple(value or ())
            for axis in axes:
                require(
                    axis in MESH_AXES,
                    f"{field.name}={value!r}: there is no mesh axis {axis!r}{near_names(str(axis), MESH_AXES)}",
                    where=f"LogicalRules.{field.name}",
                    fix=f"Use {', '.join(MESH_AXES)} or None.",
                )
            require(
                len(set(axes)) == len(axes),
                f"{field.name}={value!r}: has a mesh axis twice",
                where=f"LogicalRules.{field.name}",
                fix="Use each mesh axis once.",
            )
            # One form for a name, a list or a tuple, so that equal rules compare equal.
            object.__setattr__(self, field.name, axes or None)

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Returns the mesh axes of one logical axis; none for the logical axis None.

        Raises:
          ConfigError: no rule has that name.
        """
        if logical is None:
            return ()
        names = [field.name for field in dataclasses.fields(self)]
        if logical not in names:
            raise ConfigError(
                f"there is no rule for the logical axis {logical!r}{near_names(logical, names)}",
                where="LogicalRules",
                fix=f"Use one of {', '.join(names)}.",
            )
        return getattr(self, logical) or ()
