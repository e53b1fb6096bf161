"""Writes the model card (README.md) of an exported checkpoint.

Its contents come from the run directory: `run_card.json`, `metrics.jsonl` and, for an imported checkpoint,
`import.json`. What these files do not state is marked as unknown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from diffusion_lm.core.gin_text import one_line
from diffusion_lm.interop.diffusion import TrainedAs
from diffusion_lm.interop.name_maps.family import Family, JsonObject
from diffusion_lm.training.card import installed_versions

MODEL_CARD = "README.md"

_BOUNDS = {
    "exact": "the negative log-likelihood itself",
    "nelbo": "an upper bound of the negative log-likelihood",
    "pseudo": "a training loss, which is not a bound of a likelihood",
}
# Fields that are not printed: paths of one machine, and facts with a section of their own.
_LEFT_OUT = ("root", "class", "manifests", "path")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """The contents of a model card.

    Attributes:
      name: its title, normally the name of the folder.
      parameters: number of parameters, padding rows of the vocabulary included.
      family: the layout that was written.
      model_type: as in config.json.
      step: step of the checkpoint.
      card: contents of run_card.json; {} if there is none.
      rows: rows of metrics.jsonl.
      trained: how a diffusion model was trained; None for all others.
      sampler: the sampler of the run as plain data, or None.
      imported: contents of import.json, or None.
      files: names of the tokenizer files that were written.
      lineage: the checkpoints that the parameters were initialised from, the first one first, in words.
      bound_kind: kind of the objective's evaluation ("exact", "nelbo", "pseudo"), or "".
    """

    name: str
    parameters: int
    family: Family
    model_type: str
    step: int
    card: JsonObject
    rows: Sequence[JsonObject] = ()
    trained: TrainedAs | None = None
    sampler: JsonObject | None = None
    imported: JsonObject | None = None
    files: tuple[str, ...] = ()
    lineage: tuple[str, ...] = ()
    bound_kind: str = ""


def model_card(facts: CardFacts) -> str:
    """Returns the text of README.md. It starts with the metadata that model hubs read."""
    kind = "diffusion language model" if facts.trained else "language model"
    tags = ["diffusion-lm", facts.family.name, *(["text-diffusion"] if facts.trained else [])]
    metadata = ["---", "license: unknown", "library_name: diffusion_lm", "tags:", *(f"- {tag}" for tag in tags), "---"]
    what = f"A {kind} of {facts.parameters:,} parameters in the layout `{facts.family.name}` ({facts.family.source})."
    sections = {
        "Origin": _origin(facts),
        "Data": _data(facts),
        "Objective": _objective(facts),
        "Evaluation": _evaluation(facts),
        "Decoding": _decoding(facts),
        "Loading": _loading(facts),
        "Licence": [
            "Unknown: the run directory does not state one. The licences of the data and of the checkpoints that the "
            "weights were initialised from apply; state yours before you distribute this model."
        ],
        "Versions": _versions(facts),
    }
    lines = [*metadata, f"# {facts.name}", "", what]
    for title, text in sections.items():
        lines += ["", f"## {title}", *text]
    return "\n".join(lines) + "\n"


def _origin(facts: CardFacts) -> list[str]:
    if facts.imported is not None:
        source = one_line(PurePath(facts.imported["source"]).name)
        lines = [f"Imported from `{source}` (family {facts.imported['family']}) and written back; not trained further."]
        adapter = (facts.imported.get("report") or {}).get("adapter")
        return lines + ([f"An adapter was merged into the weights: {one_line(adapter)}."] if adapter else [])
    identity = _identity(facts)
    if not identity:
        return ["Unknown: the run directory has no run_card.json."]
    ancestors = ", then ".join(facts.lineage)
    started = f"from the parameters of {ancestors}" if ancestors else "from random initialisation"
    lines = [
        f"Trained {started}; this is the checkpoint of step {facts.step:,}, batch size {identity.get('batch_size')}."
    ]
    average = identity.get("ema_decay")
    if average is not None:
        lines.append(f"The weights are a moving average with decay {average}.")
    return [*lines, "", *_fields("optimizer", identity.get("optimizer"))]


def _data(facts: CardFacts) -> list[str]:
    manifests = _identity(facts).get("manifests") or []
    if not manifests:
        return ["Unknown." if facts.imported else "The run card names none."]
    lines = [
        f"- `{one['task']}`, split {one['split']}: {one['count']:,} examples, {one['target_tokens']:,} target tokens"
        for one in manifests
    ]
    hashes = sorted({one["vocabulary_sha256"] for one in manifests})
    window = ((_identity(facts).get("data") or {}).get("converter") or {}).get("target_window")
    vocabulary = f"Vocabulary: SHA-256 {', '.join(hashes)}."
    return [*lines, "", vocabulary, *([] if window is None else ["", *_fields("target window", window)])]


def _objective(facts: CardFacts) -> list[str]:
    lines = []
    if facts.trained is not None:
        state = "i - 1 predicts token i (shifted)" if facts.trained.shifted else "i predicts token i (same position)"
        mask = "not named" if facts.trained.mask_id is None else str(facts.trained.mask_id)
        lines = [
            f"Masked diffusion. The state at slot {state}; visibility: {facts.trained.visibility}; MASK: {mask}.",
            "",
        ]
    objective = _identity(facts).get("objective")
    if objective is not None:
        return [*lines, *_fields("objective", objective)]
    if facts.trained is not None and facts.trained.objective:
        return [
            *lines,
            f"The objective of this family is `gin/objectives/{facts.trained.objective}.gin` of diffusion_lm.",
        ]
    return lines or ["Unknown."]


def _evaluation(facts: CardFacts) -> list[str]:
    found: dict[str, tuple[object, int]] = {}
    for row in facts.rows:
        if row.get("kind") == "evaluation" and row["step"] <= facts.step:
            found |= {key: (value, row["step"]) for key, value in row.items() if key not in ("step", "kind", "timing")}
    if not found:
        return ["No evaluations in the run directory."]
    bound = f"The objective's evaluation is {_BOUNDS[facts.bound_kind]} ({facts.bound_kind}), in nats per token."
    lines = [bound, ""] if facts.bound_kind else []
    lines += ["| metric | value | step |", "|---|---|---|"]
    for key, (value, step) in found.items():
        shown = f"{value:.5g}" if isinstance(value, int | float) else str(value)
        lines.append(f"| {key} | {shown} | {step:,} |")
    return lines


def _decoding(facts: CardFacts) -> list[str]:
    if facts.sampler is not None:
        return _fields("sampler", facts.sampler)
    published = facts.family.diffusion
    if facts.trained is not None and published is not None:
        file = f"gin/samplers/{published.sampler}.gin"
        return [f"The run has no sampler. Use `{file}` of diffusion_lm with this MASK."]
    return ["The run has no sampler."]


def _loading(facts: CardFacts) -> list[str]:
    lines = [f"`config.json` has `model_type = {facts.model_type!r}`; the weights are safetensors files."]
    code = facts.family.diffusion and facts.family.diffusion.code
    if code:
        lines.append(
            "transformers has no class for it, and this folder contains no code (`auto_map` is left out on purpose). "
            f"The class is published in {code}. Inference engines that support the layout read these files as they are."
        )
    elif facts.trained is not None:
        lines.append("The class of transformers reads the weights, but with a causal mask: replace the attention mask.")
    lines.append("With diffusion_lm: `diffusion-lm import FOLDER --workdir RUN`.")
    tokenizer = ", ".join(f"`{name}`" for name in facts.files)
    lines.append(
        f"Tokenizer: {tokenizer}." if tokenizer else "No tokenizer was written: use that of the original model."
    )
    return lines


def _versions(facts: CardFacts) -> list[str]:
    def listed(versions: JsonObject) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items() if version)

    trained = facts.card.get("versions")
    written = f"Written with {listed(installed_versions())}."
    return ([] if not trained or facts.imported else [f"Trained with {listed(trained)}.", ""]) + [written]


def _identity(facts: CardFacts) -> JsonObject:
    return {} if facts.imported is not None else facts.card.get("identity", {})


def _fields(title: str, value: object) -> list[str]:
    """Returns one line about a configured object: its class and fields, nested objects in brackets."""
    return [f"{title.capitalize()}: `{_shown(value)}`"]


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        name = str(value.get("class", "")).rsplit(".", 1)[-1]
        inside = (f"{key}={_shown(item)}" for key, item in value.items() if key not in _LEFT_OUT and item is not None)
        return f"{name}({', '.join(inside)})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, str) and value.startswith("/"):
        return repr(Path(value).name)  # a path of this machine
    return repr(value)
