"""The report is one safe, self-contained page that shows what it is given and leaves out what it is not."""

import copy
import html.parser
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from diffusion_lm.recipes import charts, crossover, report, showcase, stage_chart, summary, svg, training_curves

_spec = importlib.util.spec_from_file_location("synthetic_results", Path(__file__).with_name("synthetic_results.py"))
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(html.parser.HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, source: str):
        super().__init__()
        self.stack, self.tags, self.words, self.scripts = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack, f"unopened </{tag}>"
        assert self.stack.pop() == tag, f"crossed </{tag}>"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
        elif self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parts() -> dict:
    return {
        "curves": synthetic.curves(),
        "speed": synthetic.speed(),
        "samples": synthetic.samples(),
        "playback": synthetic.playback(),
    }


NOTHING = {"curves": {}, "speed": None, "samples": {}, "playback": {}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    workdir = tmp_path_factory.mktemp("comparison")
    path = report.write(synthetic.results(), workdir, **parts())
    assert path == workdir / "report" / "index.html"
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_small(source):
    page = Page(source)
    assert len(source.encode()) < 1_000_000
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attrs in page.tags:
        if tag == "a":
            assert attrs["href"].removeprefix("#") in identifiers


def test_page_asks_nothing_of_a_network(source):
    for tag, attrs in Page(source).tags:
        assert tag not in ("iframe", "object", "embed", "img")
        for name, value in attrs.items():
            if name in ("src", "href", "action", "data", "srcset"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\(", source)


def test_every_arm_task_and_score_appears(source):
    text = Page(source).text
    results = synthetic.results()
    for arm in results["arms"]:
        assert arm["label"] in text
        for stage in arm["stages"]:
            assert stage["name"] in text
    for task in results["tasks"]:
        assert task["label"] in text
        for arm in results["arms"]:
            cell = results["cells"][arm["name"]][task["name"]]
            assert f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]" in text
    for word in ("3f9a1c44d0e2b7a8", "0.10.2", "Made-up numbers.", "CPU, 2 cores", "pseudo", "forward passes"):
        assert word.lower() in text.lower()


def test_same_input_same_bytes(source, tmp_path):
    again = report.write(synthetic.results(), tmp_path, **parts()).read_text(encoding="utf-8")
    assert again == source


ATTACK = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x' {{ 7*7 }} &amp; \u2028"


def test_text_from_models_and_data_is_escaped_everywhere():
    results, given = synthetic.results(), parts()
    results["title"] = results["notes"][0] = results["config"] = ATTACK
    for arm in results["arms"]:
        arm["label"] += ATTACK
        arm["stages"] = [dict(stage, objective=ATTACK) for stage in arm["stages"]]
    results["tasks"][0]["label"] = results["tasks"][0]["metric_label"] = ATTACK
    results["versions"] = {ATTACK: ATTACK}
    results["cells"]["ar"]["qa"]["conditions"][ATTACK] = ATTACK
    sample = given["samples"]["qa"][0]
    sample["input"] = sample["reference"] = ATTACK
    sample["outputs"]["ar"] = {"text": ATTACK, "score": 1.0}
    given["playback"]["qa"]["input"] = ATTACK
    given["playback"]["qa"]["frames"][-1][0] = given["playback"]["qa"]["frames"][0][1] = ATTACK
    given["speed"]["device"] = ATTACK
    for row in given["speed"]["rows"]:
        row["label"] += ATTACK
    page = Page(report.render(results, **given))
    assert sum(tag == "script" for tag, _ in page.tags) == 1 + len(given["playback"])
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(tag != "img" for tag, _ in page.tags)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert any(ATTACK in piece for piece, _ in json.loads(page.scripts[1])["pieces"])


def test_policy_allows_the_page_script_alone(source):
    import base64
    import hashlib

    page = Page(source)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("missing", ["curves", "speed", "samples", "playback", "all"])
def test_missing_parts_are_left_out(missing):
    given = NOTHING if missing == "all" else parts() | {missing: NOTHING[missing]}
    page = Page(report.render(synthetic.results(), **given))
    assert "absent" in {attrs.get("class") for _, attrs in page.tags}
    assert "AR2Diff 800" in page.text


def test_the_least_results_still_make_a_page():
    least = {"name": "tiny", "arms": [{"name": "a", "label": "A"}], "tasks": [{"name": "t", "label": "T"}], "cells": {}}
    page = Page(report.render(least, **NOTHING))
    assert "No arm has been scored yet." in page.text


def test_scores_that_were_not_measured_are_dashes_not_errors():
    results = synthetic.results()
    results["cells"]["ar"]["qa"]["value"] = float("nan")
    del results["cells"]["diffusion"]["code"]
    results["cells"]["ar2diff_0"]["code"] |= {"low": None, "high": None}
    source = report.render(results, **parts())
    assert "not scored" in source
    assert "nan" not in source.lower().replace("tenant", "")


def test_a_large_comparison_stays_under_a_megabyte():
    given = parts()
    long = "word < & > " * 4000
    given["curves"] = {
        name: [{"step": i, "nll_per_real_token": 3.0} for i in range(20_000)] for name in given["curves"]
    }
    for task in given["samples"]:
        outputs = {arm: {"text": long, "score": 1.0} for arm in synthetic.ARMS}
        given["samples"][task] = [{"input": long, "reference": long[::-1], "outputs": outputs}] * 50
        given["playback"][task]["frames"] = [[f"▁w{i}" for i in range(2000)]] * 1000
    assert len(report.render(synthetic.results(), **given).encode()) < 1_000_000


# --- parts ---


def test_playback_marks_exactly_the_changed_tokens():
    shown = showcase.player({"start": ["x", "y", ""], "frames": [["▁a", "y", ""], ["▁a", "b", "</s>"]]})
    assert shown.labels == ["start", "pass 1", "pass 2"]
    assert shown.changed == [[], [0], [1, 2]]
    assert shown.tokens(-1) == [(" a", "", False), ("b", "", True), ("end", "eos", True)]
    assert shown.tokens(0)[2] == ("·", "pad", False)
    assert showcase.player({"frames": []}) is None
    assert showcase.player({"frames": [["a", "b"]]}).changed == [[0, 1]]


@pytest.mark.parametrize(
    ("piece", "shown"), [("▁▁if", ("  if", "")), ("\n", ("↵\n", "newline")), ("<0x0A>", ("↵\n", "newline"))]
)
def test_pieces_read_as_text(piece, shown):
    assert showcase._display(piece) == shown


def test_differences_rebuild_the_output_and_mark_what_differs():
    reference, output = "a b c d e", "a b x d e e"
    segments = showcase.differences(reference, output)
    assert "".join(text for text, kind in segments if kind != "missing") == output
    assert [text for text, kind in segments if kind == "extra"] == ["x", "e"]
    assert showcase.differences("total += 1", "total = 1") == [("total ", ""), ("+", "missing"), ("= 1", "")]
    assert showcase.differences("alpha beta", "one two three") == [("one two three", "")]
    assert showcase.differences("alpha", "") == []


def test_shared_stages_are_drawn_once():
    results = synthetic.results()
    roots = stage_chart.stage_forest(results["arms"])
    assert [root.name for root in roots] == ["untrained", "pretrain_ar", "pretrain_diffusion"]
    assert [child.name for child in roots[1].children] == ["ar_tune", "ar2diff_0_tune", "adapt_200", "adapt_800"]
    assert len(roots[1].arms) == 4
    assert roots[1].children[2].children[0].ending == ["AR2Diff 200"]
    source = report.render(results, **NOTHING)
    drawing = source[source.index('stage-chart"') :].split("</svg>")[0]
    assert drawing.count(">pretrain_ar</text>") == 1


def test_stages_tuned_apart_for_each_task_branch():
    stages = [
        {"name": "pre", "initial": None, "steps": 5, "tokens": 10, "objective": "Autoregressive"},
        {"name": "tune_a", "initial": "pre", "steps": 5, "tokens": 10, "objective": "Denoising"},
        {"name": "tune_b", "initial": "pre", "steps": 5, "tokens": 10, "objective": "Denoising"},
    ]
    (root,) = stage_chart.stage_forest([{"label": "one", "stages": stages}])
    assert [(child.name, child.ending) for child in root.children] == [("tune_a", ["one"]), ("tune_b", ["one"])]
    Page(str(stage_chart.stage_chart([root], {"one": ("10 tokens", svg.PLAIN)})))


def test_training_curves_continue_where_the_parent_stage_ended():
    arm = {
        "name": "x",
        "label": "x",
        "stages": [{"name": "p", "steps": 100}, {"name": "q", "initial": "p", "steps": 50}],
    }
    rows = {
        "p": [{"step": 10, "loss": 5.0}, {"step": 100, "loss": 3.0, "bound": {"nll_per_real_token": 3.1}}],
        "q": [{"step": 10, "nll_per_real_token": 2.0, "loss": 4.0}, {"step": 50, "nll_per_real_token": 1.0}],
    }
    lines, marks, last = training_curves._arm_curves(arm, rows, svg.PLAIN)
    assert [(line.label, line.held_out) for line in lines] == [
        ("p", False),
        ("bound/nll_per_real_token", True),
        ("q", False),
    ]
    assert lines[2].points == ((110, 2.0), (150, 1.0))
    assert marks == [(0.0, "p"), (100.0, "q")]
    assert last == 150


def test_crossover_is_where_the_lines_meet():
    rows = []
    for length in (10, 100, 1000):
        rows += [
            {"label": "ar", "family": "ar", "length": length, "seconds": 0.01 * length, "forward_passes": length},
            {"label": "d", "family": "diffusion", "length": length, "seconds": 2.0, "forward_passes": 10},
            {"label": "fast", "family": "diffusion", "length": length, "seconds": 1e-3, "forward_passes": 1},
        ]
    series = crossover.speed_series({"rows": rows})
    assert [one.label for one in series] == ["ar", "fast", "d"]
    fast, slow = crossover.crossovers(series)
    assert slow.length == pytest.approx(200)
    assert slow.seconds == pytest.approx(2.0)
    assert slow.ratio == pytest.approx(5.0)
    assert fast.length is None
    assert "5.0x faster (faster above about 200 tokens)" in crossover.speed_sentences({"rows": rows})[0]
    assert crossover.speed_sentences(None) == []
    assert crossover.speed_sentences({"rows": rows[1::3]}) == []


@pytest.mark.parametrize(("low", "high"), [(0, 43.7), (-3, 5), (0, 0), (0.0, 0.004), (0, 1e6)])
def test_linear_ticks_cover_the_range_with_round_numbers(low, high):
    ticks = svg.linear_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_labels_at_line_ends_do_not_overlap():
    placed = charts._apart([100, 101, 102, 300], 16, 310)
    assert min(np.diff(sorted(placed))) >= 16
    assert placed == sorted(placed)
    assert max(charts._apart([300, 305, 309], 16, 310)) <= 310


def _simulate(rgb: np.ndarray, kind: str) -> np.ndarray:
    """Machado et al. 2009, full dichromacy, on linear RGB."""
    matrices = {
        "none": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    return np.clip(np.asarray(matrices[kind]) @ rgb, 0, 1)


def _colours(mode: str) -> dict[str, np.ndarray]:
    sheet = (Path(report.__file__).with_name("templates") / "report.css").read_text()
    light, dark = sheet.split("@media screen and (prefers-color-scheme: dark)")
    block = light if mode == "light" else dark.split("@media")[0]
    found = {}
    for name, code in re.findall(r"--([\w-]+): #([0-9a-f]{6})", block):
        channels = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        found[name] = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return found


def _lab(linear: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_can_be_told_apart_and_seen(mode):
    colours = _colours(mode)
    luminance = {name: 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] for name, c in colours.items()}

    def contrast(one: str, two: str) -> float:
        high, low = sorted((luminance[one], luminance[two]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", "accent", "good"):
        assert contrast(name, "card") >= 4.5, name
        assert contrast(name, "paper") >= 4.5, name
    assert contrast("mark-ink", "mark") >= 4.5
    arms = ("none", "ar", "d0", "d1", "d2", "d3")
    for name in arms:
        assert contrast(name, "card") >= 3.0, name
    for kind in ("none", "protan", "deutan"):
        seen = {name: _lab(_simulate(colours[name], kind)) for name in arms}
        for i, one in enumerate(arms):
            for two in arms[i + 1 :]:
                assert np.linalg.norm(seen[one] - seen[two]) > 15, (kind, one, two)


# --- headline and findings ---


def test_headline_claims_only_what_the_intervals_carry():
    found = summary.summarise(synthetic.results(), synthetic.speed())
    best = "the best of 4 diffusion arms"
    assert found.headline.startswith(f"AR is significantly better than {best} on Translation (41.3 vs. 36.2 BLEU).")
    assert "not significant on Extractive QA" in found.headline
    assert any("Every trained arm is significantly better" in finding for finding in found.findings)
    assert any("Training budgets differ between arms" in finding for finding in found.findings)


def test_paired_differences_overrule_overlapping_intervals():
    results = synthetic.results()
    results["differences"] = {
        "qa": [{"arm": "ar", "against": "ar2diff_800", "value": -7.4, "low": -12.0, "high": -2.0}]
    }
    task = results["tasks"][1]
    assert summary.compare(synthetic.results(), task, "ar2diff_800", "ar").outcome == "inconclusive"
    assert summary.compare(results, task, "ar2diff_800", "ar")[:1] == ("better",)
    assert summary.compare(results, task, "ar", "ar2diff_800").outcome == "worse"
    assert "diffusion arms is significantly better than AR on Extractive QA" in summary.summarise(results).headline
    results["tasks"][1]["higher_is_better"] = False
    assert summary.compare(results, task, "ar2diff_800", "ar").outcome == "worse"


def test_per_example_scores_are_paired_when_their_mean_is_the_score():
    results = synthetic.results()
    scores = np.random.default_rng(0).normal(50, 20, 300)
    for arm, shift in (("ar", 0.0), ("ar2diff_800", 2.0)):
        values = scores + shift
        results["cells"][arm]["qa"] |= {"per_example": values.tolist(), "value": float(values.mean())}
    verdict = summary.compare(results, results["tasks"][1], "ar2diff_800", "ar")
    assert (verdict.outcome, round(verdict.low, 6), round(verdict.high, 6)) == ("better", 2.0, 2.0)
    results["cells"]["ar"]["qa"]["value"] += 1  # a corpus metric: the mean is not the score
    assert summary.compare(results, results["tasks"][1], "ar2diff_800", "ar").low is None


def test_an_untrained_arm_that_is_not_beaten_is_named():
    results = synthetic.results()
    results["cells"]["ar2diff_0"]["code"] |= {"value": 0.0, "low": 0.0, "high": 1.2}
    found = [f for f in summary.summarise(results).findings if "untrained" in f]
    assert found == ["Not significantly better than the untrained network: AR2Diff 0 on Code synthesis."]


def test_an_untrained_stage_shared_by_name_is_no_transfer():
    results = copy.deepcopy(synthetic.results())
    start = {"name": "init", "initial": None, "steps": 0, "tokens": 0, "objective": "Autoregressive"}
    for arm in results["arms"]:
        arm["stages"].insert(0, start)
    assert [arm["name"] for arm in summary.transferred_arms(results)] == ["ar2diff_0", "ar2diff_200", "ar2diff_800"]
