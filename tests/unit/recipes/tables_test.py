"""The quality matrix: what is printed, how wide, what is bold."""

import importlib.util
import io
from pathlib import Path

from diffusion_lm.recipes import tables

_spec = importlib.util.spec_from_file_location("synthetic_results", Path(__file__).with_name("synthetic_results.py"))
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


def test_markdown_table_has_every_score_and_bold_best():
    text = tables.quality_markdown(synthetic.results())
    lines = text.splitlines()
    assert len(lines) == 2 + len(synthetic.ARMS)
    assert len({line.count("|") for line in lines}) == 1
    assert "| **41.3** [38.9, 43.7] |" in lines[3]
    assert text.count("**") == 2 * 3
    assert all(len(line) <= tables.MAX_COLUMNS for line in lines)


def test_many_tasks_continue_in_further_tables():
    results = synthetic.results()
    results["tasks"] = [dict(results["tasks"][0], label=f"Translation number {i}") for i in range(7)]
    text = tables.quality_markdown(results)
    assert all(len(line) <= tables.MAX_COLUMNS for line in text.splitlines())
    assert all(text.count(f"Translation number {i} ") == 1 for i in range(7))
    assert len(text.split("\n\n")) > 1


def test_lower_is_better_missing_scores_ties_and_small_scales():
    results = synthetic.results()
    results["tasks"] = results["tasks"][:1]
    results["tasks"][0] |= {"higher_is_better": False, "metric_label": "loss"}
    for arm, value in zip(synthetic.ARMS, (None, 0.5, 0.25, 0.2501, 0.75, 0.9), strict=True):
        results["cells"][arm]["translation"] = {"value": value}
    text = tables.quality_markdown(results)
    assert "(loss) ↓" in text
    assert text.count("**0.250**") == 2
    assert "\N{EN DASH}" in text.splitlines()[2]


def test_labels_cannot_break_the_table():
    results = synthetic.results()
    results["arms"][0]["label"] = "a | b <script>\n**c**"
    results["tasks"] = results["tasks"][:1]
    text = tables.quality_markdown(results)
    assert "a \\| b \\<script> \\*\\*c\\*\\*" in text
    assert len(text.splitlines()) == 2 + len(synthetic.ARMS)


def test_terminal_table_fits_and_prints_all():
    out = io.StringIO()
    tables.quality_terminal(synthetic.results(), out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= tables.MAX_COLUMNS
    assert "\x1b" not in text
    for label in synthetic.LABELS:
        assert label in text
    assert "71.6 [67.5, 75.7]" in text


def test_results_file_is_complete_and_whole(tmp_path):
    path = tables.write_markdown(synthetic.results(), tmp_path, synthetic.speed())
    text = path.read_text(encoding="utf-8")
    assert path.name == "results.md"
    assert text.startswith("# Autoregression, diffusion, and the road between\n")
    assert "AR is significantly better than the best of 4 diffusion arms on Translation" in text
    assert "faster above about" in text
    assert "3f9a1c44d0e2b7a85f60" in text
    assert [p.name for p in tmp_path.iterdir()] == ["results.md"]


def test_log_rows_survive_a_killed_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert tables.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert tables.read_jsonl(path) == [{"step": 1}, {"step": 2}]
