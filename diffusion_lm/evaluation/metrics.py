"""Metrics as functions of summed sufficient statistics, so that corpus scores can be bootstrapped over examples.

A `Metric` maps each (reference, prediction) to a row of additive statistics. The corpus score is a function of the
*sum* of the rows. BLEU has rows of n-gram counts and lengths; a mean has rows (value, 1). Scores are percentages. The
functions at the end of the module (`bleu`, `squad`, ...) have SeqIO's signature `metric(targets, predictions) -> dict`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.evaluation import metric_references as forms
from diffusion_lm.evaluation.metric_references import possible_answers as possible_answers
from diffusion_lm.evaluation.metrics_answers import contains_rows, exact_rows, number_rows, squad_rows, squad_v2_rows
from diffusion_lm.evaluation.metrics_answers import last_number as last_number
from diffusion_lm.evaluation.metrics_code import code_rows
from diffusion_lm.evaluation.metrics_code import pass_at_k_estimate as pass_at_k_estimate
from diffusion_lm.evaluation.metrics_reasoning import ANSWER_MARK as ANSWER_MARK
from diffusion_lm.evaluation.metrics_reasoning import answer_rows, countdown_rows
from diffusion_lm.evaluation.metrics_reasoning import final_answer as final_answer
from diffusion_lm.evaluation.metrics_rouge import ROUGE_NAMES, rouge_rows

Rows = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
"""`(references, predictions) -> f64[N, K]`; references in the form that the metric's reader returns."""

Values = Callable[[np.ndarray], dict[str, float]]
"""`f64[K] -> {name: score}`."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric: statistics per example, and scores of their sum.

    Attributes:
      name: key in `METRICS`.
      primary_key: key of the primary score.
      label: name of the primary score in reports.
      rows: `(references, predictions) -> f64[N, K]`, one row of statistics per example. References are as returned by
        `read`.
      values: `f64[K] -> {name: score}`, the scores of the summed rows. Every score is a percentage.
      multiple_samples: whether a prediction is a sequence of samples (pass@k) instead of one text.
      conditions: details needed to compare the score with published numbers.
      read: reader of one reference (`metric_references`); raises an error for an invalid form.
    """

    name: str
    primary_key: str
    label: str
    rows: Rows
    values: Values
    multiple_samples: bool = False
    conditions: str = ""
    read: forms.Reader = forms.text

    def per_example_batch(
        self, references: Sequence[object], predictions: Sequence[object], names: Sequence[str] | None = None
    ) -> np.ndarray:
        """Returns the statistics f64[N, K].

        Args:
          references: one reference per example.
          predictions: one prediction per example: a text, or a sequence of samples if `multiple_samples`.
          names: names of the examples in error messages; None = "example 0", ...

        Raises:
          ConfigError: the two sequences differ in length, or one of their values has the wrong form.
        """
        require(
            len(references) == len(predictions),
            f"{len(references)} references but {len(predictions)} predictions",
            where=f"metric {self.name}",
            fix="Pass one prediction per reference; use an empty string for a missing one.",
        )
        read_prediction = forms.samples if self.multiple_samples else forms.prediction
        return self.rows(self.checked(references, names), self._each(read_prediction, predictions, names))

    def checked(self, references: Sequence[object], names: Sequence[str] | None = None) -> list[Any]:
        """Returns the references in the form of `rows`; raises ConfigError for the first one that is invalid."""
        return self._each(self.read, references, names)

    def _each(self, reader: forms.Reader, values: Sequence[object], names: Sequence[str] | None) -> list[Any]:
        found = []
        for number, value in enumerate(values):
            try:
                found.append(reader(value))
            except forms.WrongValue as error:
                name = f"example {number}" if names is None else names[number]
                raise ConfigError(f"{name} {error.what}", where=f"metric {self.name}", fix=error.fix) from error
        return found

    def per_example(self, reference: object, prediction: object) -> np.ndarray:
        """Returns the statistics f64[K] of one example."""
        return self.per_example_batch([reference], [prediction])[0]

    def all_values(self, statistics: np.ndarray) -> dict[str, float]:
        """Returns all scores of statistics f64[N, K], or of their sum f64[K]."""
        statistics = np.asarray(statistics, np.float64)
        return self.values(statistics.sum(0) if statistics.ndim == 2 else statistics)

    def aggregate(self, statistics: np.ndarray) -> float:
        """Returns the primary score of statistics f64[N, K], or of their sum f64[K]."""
        return self.all_values(statistics)[self.primary_key]

    def secondary(self, statistics: np.ndarray) -> dict[str, float]:
        """Returns the scores other than the primary one."""
        return {name: value for name, value in self.all_values(statistics).items() if name != self.primary_key}

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the scores that exist for every corpus, which are those of an empty one."""
        return tuple(self.all_values(self.per_example_batch([], [])))

    def __call__(self, references: Sequence[object], predictions: Sequence[object]) -> dict[str, float]:
        """Returns all scores of a corpus."""
        return self.all_values(self.per_example_batch(references, predictions))


# --- BLEU (Papineni et al. 2002) as sacrebleu computes it: mixed case, exponential smoothing, a named tokenisation ---


@functools.cache
def _bleu(tokenize: str) -> BLEU:
    return BLEU(tokenize=tokenize, smooth_method="exp", effective_order=False)


def bleu_signature(tokenize: str = "13a") -> str:
    """Returns sacrebleu's signature of the configuration, e.g. `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|...`."""
    scorer = BLEU(tokenize=tokenize, smooth_method="exp", effective_order=False)
    scorer.corpus_score(["a"], [["a"]])
    return str(scorer.get_signature())


def _bleu_rows(references: Sequence[str], predictions: Sequence[str], tokenize: str = "13a") -> np.ndarray:
    rows = []
    for reference, prediction in zip(references, predictions, strict=True):
        score = _bleu(tokenize).corpus_score([prediction], [[reference]])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.asarray(rows, np.float64).reshape(-1, 10)


def _bleu_values(total: np.ndarray) -> dict[str, float]:
    counts = [round(float(x)) for x in total]
    if not counts[0]:
        return {"bleu": 0.0, "length_ratio": 0.0}
    score = BLEU.compute_bleu(
        correct=counts[2:6],
        total=counts[6:10],
        sys_len=counts[0],
        ref_len=counts[1],
        smooth_method="exp",
        effective_order=False,
    )
    return {"bleu": float(score.score), "length_ratio": 100.0 * counts[0] / max(counts[1], 1)}


def _mean(total: np.ndarray, column: int) -> float:
    return 100.0 * float(total[column] / total[-1]) if total[-1] else 0.0


def _code_values(total: np.ndarray) -> dict[str, float]:
    """Returns pass@1 and pass@k with k = (mean) number of samples, e.g. AR2Diff's Pass@80 with 80 samples."""
    samples = float(total[2] / total[3]) if total[3] else 0.0
    return {"pass_at_1": _mean(total, 0), "pass_at_k": _mean(total, 1), "k": samples}


def _squad_values(total: np.ndarray) -> dict[str, float]:
    """Returns the scores of all questions; if some are unanswerable, also those of both kinds and their number."""
    exact, f1, abstained, answerable, count = map(float, total)
    values = {"f1": _percent(f1 + abstained, count), "em": _percent(exact + abstained, count)}
    if count == answerable:
        return values
    if answerable:
        values |= {"answerable_f1": _percent(f1, answerable), "answerable_em": _percent(exact, answerable)}
    return values | {
        "unanswerable_em": _percent(abstained, count - answerable),
        "unanswerable": count - answerable,
    }


def _squad_v2_values(total: np.ndarray) -> dict[str, float]:
    """Returns the scores under the names of the official script, without kinds of questions that do not occur."""
    both = total[:3] + total[3:]
    values = {"exact": _mean(both, 0), "f1": _mean(both, 1), "total": float(both[2])}
    for name, part in (("HasAns", total[:3]), ("NoAns", total[3:])):
        if part[2]:
            values |= {f"{name}_exact": _mean(part, 0), f"{name}_f1": _mean(part, 1), f"{name}_total": float(part[2])}
    return values


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0


_OFFICIAL = "official SQuAD v1.1 normalisation; maximum over the gold answers; unanswerable questions as in v2.0"
_OFFICIAL_V2 = "official evaluate-v2.0.py; an empty prediction means no answer; no probability threshold"
_ESTIMATOR = "unbiased estimator 1 - C(n-c,k)/C(n,k); all tests of a problem must pass"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu", "bleu", "BLEU", _bleu_rows, _bleu_values, conditions=f"sacrebleu {bleu_signature()}"),
        Metric(
            "bleu_intl",
            "bleu",
            "BLEU (intl)",
            functools.partial(_bleu_rows, tokenize="intl"),
            _bleu_values,
            conditions=f"sacrebleu {bleu_signature('intl')}",
        ),
        Metric(
            "rouge",
            "rougeL",
            "ROUGE-L",
            rouge_rows,
            lambda total: {name: _mean(total, column) for column, name in enumerate(ROUGE_NAMES)},
            conditions="F1, ASCII letters and digits, lower case, no stemming (rouge-score's rules)",
        ),
        Metric(
            "number_match",
            "accuracy",
            "accuracy",
            number_rows,
            lambda total: {"accuracy": _mean(total, 0)},
            conditions="the last number of the text equals the answer",
            read=forms.numbers,
        ),
        Metric("squad", "f1", "F1", squad_rows, _squad_values, False, _OFFICIAL, forms.possible_answers),
        Metric(
            "squad_v2", "f1", "F1 (v2)", squad_v2_rows, _squad_v2_values, False, _OFFICIAL_V2, forms.possible_answers
        ),
        Metric("pass_at_1", "pass_at_1", "pass@1", code_rows, _code_values, True, _ESTIMATOR, forms.problem),
        Metric("pass_at_k", "pass_at_k", "pass@k", code_rows, _code_values, True, _ESTIMATOR, forms.problem),
        Metric(
            "exact_match",
            "exact_match",
            "exact match",
            exact_rows,
            lambda total: {"exact_match": _mean(total, 0)},
            conditions="equal after stripping white space",
            read=forms.answers,
        ),
        Metric(
            "contains",
            "contains",
            "contains",
            contains_rows,
            lambda total: {"contains": _mean(total, 0)},
            conditions="the text contains an answer, both with SQuAD normalisation",
            read=forms.answers,
        ),
        Metric(
            "final_answer",
            "accuracy",
            "accuracy",
            answer_rows,
            lambda total: {"accuracy": _mean(total, 0), "answered": _mean(total, 1)},
            conditions="the number after the last '####' equals that of the reference",
            read=forms.chain_answer,
        ),
        Metric(
            "countdown",
            "solved",
            "solved",
            countdown_rows,
            lambda total: {"solved": _mean(total, 0)},
            conditions="every step is correct, every number is used once, the result is the goal; any solution counts",
            read=forms.countdown,
        ),
    )
}
"""All metrics by name. The corpus score is `aggregate` of the rows of `per_example_batch`."""


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns corpus BLEU by sacrebleu (signature: `bleu_signature()`), and the length ratio in percent."""
    return METRICS["bleu"](targets, predictions)


def bleu_intl(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns corpus BLEU by sacrebleu with `intl` tokenisation, and the length ratio in percent."""
    return METRICS["bleu_intl"](targets, predictions)


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the F1 of ROUGE-1, ROUGE-2 and ROUGE-L in percent, means over examples."""
    return METRICS["rouge"](targets, predictions)


def number_match(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions whose last number is (one of) the reference(s)."""
    return METRICS["number_match"](targets, predictions)


def squad(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns F1 and exact match of SQuAD v1.1 in percent; targets as in `metric_references.possible_answers`.

    If some questions are unanswerable, both kinds are also scored separately, and `unanswerable` is their number.
    """
    return METRICS["squad"](targets, predictions)


def squad_v2(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns `exact`, `f1` and `total` of SQuAD v2.0, also with `HasAns_` and `NoAns_`, as in the official script."""
    return METRICS["squad_v2"](targets, predictions)


def pass_at_k(targets: Sequence[object], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns pass@1 and pass@k, with k the number of samples.

    Targets are `{"setup", "tests"}`, predictions are lists of programs. `tests` is a list of texts, or one text for a
    single test. A target without a test is an error.
    """
    return METRICS["pass_at_k"](targets, predictions)


def exact_match(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions equal to (one of) the reference(s), ignoring surrounding white space."""
    return METRICS["exact_match"](targets, predictions)


def contains(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that contain (one of) the answer(s)."""
    return METRICS["contains"](targets, predictions)


def final_answers(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions with the correct answer after `####`, and of those with any answer."""
    return METRICS["final_answer"](targets, predictions)


def countdown(targets: Sequence[object], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of problems solved; each target is `{"numbers": [int, ...], "goal": int}`."""
    return METRICS["countdown"](targets, predictions)
