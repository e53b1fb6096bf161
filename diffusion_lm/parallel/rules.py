"""Which mesh axes each logical axis is split over: one dataclass, one field per logical axis.

Parameters and activations have names of their own where they differ: `embed` is the model axis of a stored parameter
(sharded by FSDP), `activation_embed` the same axis of a hidden state (whole on every device by default).
"""

import dataclasses

from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class LogicalRules:
    """Mesh axes of each logical axis: a name, several names (outermost first), or None for not split.

    The defaults are FSDP with tensor parallelism; with a mesh axis of size 1 its part falls away, so the same rules
    serve one device, pure data parallelism and a pod.

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
      norm: the scale of a norm; small, hence whole everywhere.
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
                    f"{field.name} is split over {axis!r}, which is no mesh axis{near_names(str(axis), MESH_AXES)}",
                    where=f"LogicalRules.{field.name}",
                    fix=f"Use {', '.join(MESH_AXES)} or None.",
                )
            require(
                len(set(axes)) == len(axes),
                f"{field.name} names a mesh axis twice: {axes}",
                where=f"LogicalRules.{field.name}",
                fix="Name each mesh axis once.",
            )
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
                fix=f"Name one of {', '.join(names)}.",
            )
        return getattr(self, logical) or ()
