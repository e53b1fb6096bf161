"""Named sets of compiler options, by platform. None is on unless `TrainRun.xla_options` names it.

A set says how a step is compiled and not what it computes. Where a platform has no options in it, it changes nothing:
one configuration runs everywhere.
"""

from collections.abc import Mapping, Sequence

from diffusion_lm.core.errors import ConfigError, near_names

Options = Mapping[str, bool | int | str]

SETS: Mapping[str, Mapping[str, Options]] = {
    # Collectives run beside computation where the default leaves them in line: gathers of fsdp above all.
    "overlap_collectives": {
        "tpu": {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        # Options that pipeline collectives over the turns of a loop are gone from jax 0.12.
        "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    },
    # Gradients of several slices are added up over the data-center network while the backward pass goes on.
    "overlap_slices": {
        "tpu": {
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
        },
    },
    # Fusions may keep more in a core's vector memory: 96 MiB of the 128 MiB of v5e, v5p and v6e. Dense networks gain.
    "large_vmem": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 98304}},
    # All matrix products by Triton, with their prologues and epilogues, instead of those that cuBLAS is slower at.
    "triton_gemm": {"gpu": {"xla_gpu_triton_gemm_any": True}},
}


def check_sets(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a name that no set has."""
    for name in names:
        if name not in SETS:
            raise ConfigError(
                f"there are no XLA options called {name!r}{near_names(name, SETS)}",
                where="TrainRun.xla_options",
                fix=f"Use some of {', '.join(SETS)}.",
            )


def xla_options(names: Sequence[str], platform: str) -> dict[str, bool | int | str]:
    """Returns the compiler options of the named sets on a platform ("tpu", "gpu", "cpu"), as `jax.jit` takes them.

    Raises:
      ConfigError: there is no set of a name.
    """
    check_sets(names)
    return {option: value for name in names for option, value in SETS[name].get(platform, {}).items()}
