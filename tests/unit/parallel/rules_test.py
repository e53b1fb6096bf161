import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.rules import LogicalRules


def test_lists_from_gin_equal_tuples():
    assert LogicalRules(batch=["data", "fsdp"]) == LogicalRules(batch=("data", "fsdp"))
    assert LogicalRules(mlp="tensor") == LogicalRules(mlp=["tensor"])
    assert hash(LogicalRules(batch=["data"])) == hash(LogicalRules(batch="data"))


def test_none_and_empty_mean_whole():
    rules = LogicalRules(embed=[])
    assert rules.mesh_axes("embed") == ()
    assert rules.mesh_axes(None) == ()


def test_misspelt_mesh_axis_names_the_near_one():
    with pytest.raises(ConfigError, match="tensor"):
        LogicalRules(mlp="tensr")


def test_mesh_axis_named_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        LogicalRules(batch=("data", "data"))


def test_unknown_logical_axis_names_the_near_one():
    with pytest.raises(ConfigError, match=r"did you mean .*embed"):
        LogicalRules().mesh_axes("embd")
