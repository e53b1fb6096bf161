"""Each check accepts the ends of its range and names value, parameter and fix for what is outside."""

import pytest

from diffusion_lm.core import checks
from diffusion_lm.core.errors import ConfigError

GOOD = [
    (checks.check_choice, ("full", ("full", "causal")), {}),
    (checks.check_probability, (0,), {}),
    (checks.check_probability, (1.0,), {}),
    (checks.check_probability, (0.0,), {"below_one": True}),
    (checks.check_positive, (1e-9,), {}),
    (checks.check_non_negative, (0,), {}),
    (checks.check_count, (1,), {}),
    (checks.check_count, (0,), {"minimum": 0}),
]
BAD = [
    (checks.check_choice, ("ful", ("full", "causal")), {}, r"x='ful': not one of the choices.*full"),
    (checks.check_probability, (-0.1,), {}, r"x=-0.1: must be in \[0, 1\]"),
    (checks.check_probability, (1.1,), {}, r"x=1.1: must be in \[0, 1\]"),
    (checks.check_probability, (1.0,), {"below_one": True}, r"x=1.0: must be in \[0, 1\)"),
    (checks.check_probability, (float("nan"),), {}, r"x=nan: must be in"),
    (checks.check_positive, (0,), {}, r"x=0: must be > 0"),
    (checks.check_non_negative, (-1,), {}, r"x=-1: must be >= 0"),
    (checks.check_count, (0,), {}, r"x=0: must be an integer >= 1"),
    (checks.check_count, (2.0,), {}, r"x=2.0: must be an integer"),
    (checks.check_count, (True,), {}, r"x=True: must be an integer"),
    (checks.check_count, (None,), {}, r"x=None: must be an integer"),
]


@pytest.mark.parametrize(("check", "arguments", "options"), GOOD)
def test_ends_of_the_range_pass(check, arguments, options):
    check(*arguments, where="Thing.x", **options)


@pytest.mark.parametrize(("check", "arguments", "options", "message"), BAD)
def test_what_is_outside_is_refused_with_value_parameter_and_fix(check, arguments, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(*arguments, where="Thing.x", **options)
    assert "Thing.x" in str(caught.value)
    assert "Use" in str(caught.value)
