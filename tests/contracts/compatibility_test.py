"""Which samplers of `gin/samplers` undo what the objectives of `gin/objectives` train, and which mistakes are named."""

import dataclasses

import gin_objects
import pytest

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.target_window import EosFilled, ExactEos, ExactTokens, OracleLength, PadFilled
from diffusion_lm.evaluation.compatibility import check_sampler, check_window, sampler_differences
from diffusion_lm.noise.contract import MASK_NOISE, Contract, mismatches

LEFT_TO_RIGHT = ("greedy", "beam", "temperature", "top_p", "self_speculation", "introspective")
MASKED = (
    *(
        "mdlm_ancestral",
        "md4_ancestral",
        "first_hitting",
        "remdm_cap",
        "llada_low_confidence",
        "llada_random",
        "infilling",
    ),
    *("threshold", "factor", "entropy_bounded", "guided", "eos_stop", "fast_dllm_dual_cache"),
    "rdm_uncond_deterministic_cosine",
)
SHIFTED = (
    *("diffullama_topk", "diffullama_random_keep", "dream_origin", "dream_entropy", "dream_margin"),
    *("dream_maskgit_plus", "dream_released"),
)
UNIFORM = ("udlm_ancestral", "udlm_guided", "udlm_predictor_corrector", "sundae", "sundae_partial")
OWN = {
    "autoregressive": LEFT_TO_RIGHT,
    "prefix_autoregressive": (),
    "mdlm": MASKED,
    "md4": MASKED,
    "d3pm_absorb": MASKED,
    "llada": MASKED,
    "genmd4": ("genmd4_ancestral",),
    "mlm": MASKED,
    "mask_and_replace": (*MASKED, "gidd_ancestral"),
    "diffullama": SHIFTED,
    "diffullama_code": SHIFTED,
    "diffullama_annealed": SHIFTED,
    "dream": SHIFTED,
    "rdm": ("length_beam", "oracle_length"),
    "sundae": UNIFORM,
    "sundae_sampled": UNIFORM,
    "udlm": UNIFORM,
    "d3pm_uniform": UNIFORM,
    "gidd": ("gidd_ancestral", "gidd_self_correction"),
    "sedd_absorb": ("sedd_euler", "sedd_tweedie"),
    "sedd_uniform": ("sedd_euler_uniform", "sedd_tweedie_uniform"),
    "bd3lm": ("bd3lm", "bd3lm_released"),
    "sdar": ("sdar",),
    "fast_dllm_v2": ("fast_dllm_v2",),
    "nemotron": ("nemotron", "self_speculation", "greedy"),
    "introspective": ("introspective", "greedy"),
    "diffusion_gemma": ("diffusion_gemma_canvas", "greedy"),
    "mixture": ("greedy",),
    # The files of these name no sampler: the size of a block is bound with the recipe.
    "efficient_dlm": (),
    "llada2": (),
}


def objective(name):
    return gin_objects.build(gin_objects.GIN / "objectives" / f"{name}.gin", "OBJECTIVE")


def sampler(name):
    return gin_objects.build(gin_objects.GIN / "samplers" / f"{name}.gin", "SAMPLER")


def test_every_objective_says_what_it_trains():
    assert set(OWN) == {path.stem for path in gin_objects.files("objectives")}
    for name in OWN:
        assert objective(name).needs().contracts, name


def test_every_sampler_decodes_some_objective():
    decoded = {name for names in OWN.values() for name in names}
    rest = {path.stem for path in gin_objects.files("samplers")} - decoded
    trained = objective("mdlm").needs().contracts
    assert {name for name in rest if sampler_differences(trained, sampler(name))} == set()


@pytest.mark.parametrize("name", OWN)
def test_an_objective_fits_its_own_samplers(name):
    trained = objective(name).needs().contracts
    for own in OWN[name]:
        assert sampler_differences(trained, sampler(own)) == (), own


@pytest.mark.parametrize(
    ("trained", "decoded", "complaints"),
    [
        ("autoregressive", "llada_low_confidence", ("no noise", "MASK noise", "'causal'", "'full'", "alignment")),
        ("mdlm", "greedy", ("MASK noise", "no noise", "'full'", "'causal'")),
        ("udlm", "mdlm_ancestral", ("uniform noise", "MASK noise")),
        ("mdlm", "udlm_ancestral", ("MASK noise", "uniform noise")),
        ("mdlm", "gidd_ancestral", ("MASK noise", "noise of MASK and uniform tokens")),
        ("gidd", "udlm_ancestral", ("noise of MASK and uniform tokens", "uniform noise")),
        ("sedd_uniform", "sundae", ("ratios", "probabilities")),
        ("sedd_uniform", "sedd_tweedie", ("uniform noise", "MASK noise")),
        ("sedd_absorb", "mdlm_ancestral", ("ratios", "probabilities")),
        ("mdlm", "dream_entropy", ("alignment is SamePosition in training and Shifted",)),
        ("dream", "threshold", ("alignment is Shifted in training and SamePosition",)),
        ("llada2", "threshold", ("'example_blocks:32'", "'full'")),
        ("sdar", "bd3lm", ("'example_blocks:4'", "'example_blocks:16'")),
        ("prefix_autoregressive", "greedy", ("'prefix'", "'causal'")),
        ("rdm", "rdm_uncond_deterministic_cosine", ("EOS is clean in training",)),
    ],
)
def test_what_does_not_belong_together_is_named(trained, decoded, complaints):
    with pytest.raises(ConfigError) as error:
        check_sampler(objective(trained).needs().contracts, sampler(decoded), where="here", fix="Do.")
    for complaint in complaints:
        assert complaint in str(error.value)


def test_another_order_of_blocks_is_named():
    one = Contract(MASK_NOISE, "blocks:4", SamePosition())
    assert mismatches((one,), one) == ()
    assert "causal_context" in mismatches((one,), dataclasses.replace(one, causal_context=True))[0]
    assert "seeds" in mismatches((one,), dataclasses.replace(one, seeds=True))[0]
    assert mismatches((), one) == (), "nothing is known, nothing is compared"
    other = dataclasses.replace(one, alignment=Shifted())
    assert mismatches((other, one), one) == (), "one process that fits is enough"


def test_windows_that_do_not_fit_the_length_model_are_errors():
    def check(name, window):
        check_window(objective(name).needs(), window, where="converter.target_window")

    with pytest.raises(ConfigError, match="keeps EOS clean and PadFilled fills the window"):
        check("rdm", PadFilled())
    with pytest.raises(ConfigError, match="a tail of eos jointly, but PadFilled"):
        check("dream", PadFilled())
    for name, windows in {
        "rdm": (ExactEos(), OracleLength()),
        "dream": (EosFilled(), ExactTokens()),
        "llada": (EosFilled(), PadFilled(), ExactEos()),
        "sundae": (PadFilled(),),
        "mixture": (PadFilled(),),
    }.items():
        for window in windows:
            check(name, window)
