"""Which arms the likelihood matrix shows, and how it marks bounds."""

from diffusion_lm.recipes import likelihood_table, tables
from diffusion_lm.recipes.formatting import MISSING


def _results():
    def cell(passes):
        return {"value": 1.0, "conditions": {"forward_passes_per_sample": passes}}

    return {
        "name": "bounds",
        "arms": [{"name": name, "label": name.upper(), "family": "diffusion"} for name in ("ar", "mdlm", "sundae")],
        "tasks": [{"name": "code", "label": "code", "metric_label": "pass@1"}, {"name": "qa", "label": "QA"}],
        "cells": {
            "ar": {"code": cell(24.0), "qa": cell(4.2)},
            "mdlm": {"code": cell(28.0), "qa": cell(28.0)},
            "sundae": {"code": cell(40.0), "qa": cell(40.0)},
        },
        "bounds": {
            "ar": {"code": {"kind": "exact", "bits_per_real_token": 1.25}},
            "mdlm": {"code": {"kind": "nelbo", "bits_per_real_token": 1.5, "bits_per_real_token_error": 0.0123}},
            "sundae": {"code": {"kind": "pseudo", "loss": 0.3}},
        },
    }


def test_bounds_are_marked_and_pseudo_likelihoods_left_out():
    found = likelihood_table.rows(_results())
    assert found == [("AR", ["1.250", MISSING], "4-24"), ("MDLM", ["<= 1.500 ± 0.012", MISSING], "28")]
    text = likelihood_table.markdown(_results())
    assert "SUNDAE" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_results_show_the_matrix_only_where_there_is_a_bound():
    results = _results()
    assert "bits/token" in tables.markdown(results)
    del results["bounds"]["mdlm"]
    assert "bits/token" not in tables.markdown(results)
