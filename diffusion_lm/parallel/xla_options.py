"""Named sets of compiler options per platform. A set applies only if `TrainRun.xla_options` names it.

A set determines how a step is compiled and not what it computes. It has no effect on platforms for which it has no
options, so one configuration runs everywhere.
"""

from collections.abc import Mapping, Sequence

from diffusion_lm.core.errors import ConfigError, near_names

Options = Mapping[str, bool | int | str]

SETS: Mapping[str, Mapping[str, Options]] = {
    # Collectives overlap with computation, above all the gathers of FSDP; by default they run in sequence.
    "overlap_collectives": {
        "tpu": {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        # jax 0.12 removed the options that pipeline collectives over the iterations of a loop.
        "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    },
    # Gradients of several slices are summed over the data-center network during the backward pass.
    "overlap_slices": {
        "tpu": {
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
        },
    },
    # Fusions may use more of a core's vector memory: 96 MiB of the 128 MiB of v5e, v5p and v6e. Helps dense networks.
    "large_vmem": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 98304}},
    # All matrix products by Triton, fused with their prologues and epilogues, not only those where cuBLAS is slower.
    "triton_gemm": {"gpu": {"xla_gpu_triton_gemm_any": True}},
}


def check_sets(names: Sequence[str]) -> None:
    """Raises `ConfigError` for an unknown name."""
    for name in names:
        if name not in SETS:
            raise ConfigError(
                f"xla_options={name!r}: there is no such set{near_names(name, SETS)}",
                where="TrainRun.xla_options",
                fix=f"Use some of {', '.join(SETS)}.",
            )


def xla_options(names: Sequence[str], platform: str) -> dict[str, bool | int | str]:
    """Returns the compiler options of the named sets on a platform ("tpu", "gpu", "cpu"), as `jax.jit` takes them.

    Raises:
      ConfigError: a name is unknown.
    """
    check_sets(names)
    return {option: value for name in names for option, value in SETS[name].get(platform, {}).items()}
