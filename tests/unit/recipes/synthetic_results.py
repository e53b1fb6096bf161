"""A made-up comparison with every part that a report can show."""

import math
import re

import numpy as np

ARMS = ("untrained", "ar", "diffusion", "ar2diff_0", "ar2diff_200", "ar2diff_800")
LABELS = ("Untrained", "AR", "Diffusion", "AR2Diff 0", "AR2Diff 200", "AR2Diff 800")
TASKS = ("translation", "qa", "code")
SCORES = {
    "translation": (0.4, 41.3, 33.1, 31.6, 34.0, 36.2),
    "qa": (2.1, 64.2, 70.8, 61.9, 66.4, 71.6),
    "code": (0.0, 18.4, 16.9, 8.7, 12.3, 17.5),
}
PRETRAIN, TUNE, ROW = 1600, 1200, 2048

CODE = """def count_vowels(text):
    total = 0
    for letter in text:
        if letter in 'aeiou':
            total += 1
    return total"""
SAMPLES = {
    "translation": {
        "input": "Translate to French: The library will stay open until nine in the evening on Thursday.",
        "reference": "La bibliothèque restera ouverte jusqu'à neuf heures du soir jeudi.",
        "outputs": (
            "gne ▁ quot ro<s> 7 zz plo mer mer",
            "La bibliothèque restera ouverte jusqu'à neuf heures du soir le jeudi.",
            "La bibliothèque reste ouverte à neuf heures heures du soir jeudi.",
            "La bibliothèque va ouvrir neuf heures soir de jeudi.",
            "La bibliothèque restera ouvert jusqu'à neuf heures soir jeudi.",
            "La bibliothèque restera ouverte jusqu'à neuf heures du soir jeudi.",
        ),
    },
    "qa": {
        "input": "question: What is the capital of Burkina Faso? context: Burkina Faso is a country in Africa. "
        "Its capital is Ouagadougou, its currency is the West African CFA franc, and its official language is French. "
        "The time zone of its capital is Africa/Ouagadougou.",
        "reference": "Ouagadougou",
        "outputs": ("q", "Ouagadougou", "Ouagadougou", "Africa", "Ouagadougou", "West African Ouagadougou"),
    },
    "code": {
        "input": "Write a function count_vowels(text) that returns the number of vowels in a text.\n"
        "assert count_vowels('tree') == 2",
        "reference": CODE,
        "outputs": (
            "",
            CODE,
            CODE.replace("total += 1", "total = 1"),
            "def count_vowels(text):\n    total = 0\n    for letter in text\n        total total\n    return",
            CODE.replace("letter in text", "x in text").replace("if letter", "if x"),
            CODE.replace("'aeiou'", "'aeio'"),
        ),
    },
}


def results() -> dict:
    arms = []
    for name, label in zip(ARMS, LABELS, strict=True):
        stages = []

        def stage(stage_name, steps, objective, stages=stages):
            stages.append(
                {
                    "name": stage_name,
                    "initial": stages[-1]["name"] if stages else None,
                    "steps": steps,
                    "tokens": steps * ROW,
                    "objective": objective,
                }
            )

        if name == "untrained":
            stage("untrained", 0, "Autoregressive")
        if name == "ar" or name.startswith("ar2diff"):
            stage("pretrain_ar", PRETRAIN, "Autoregressive")
        if name == "ar":
            stage("ar_tune", TUNE, "Autoregressive")
        if name == "diffusion":
            stage("pretrain_diffusion", PRETRAIN, "Denoising")
            stage("diffusion_tune", TUNE, "Denoising")
        if name.startswith("ar2diff"):
            extra = int(name.split("_")[1])
            if extra:
                stage(f"adapt_{extra}", extra, "Denoising")
            stage(f"{name}_tune", TUNE, "Denoising")
        family = {"untrained": "none", "ar": "ar"}.get(name, "diffusion")
        tokens = sum(s["tokens"] for s in stages)
        arms.append(
            {
                "name": name,
                "label": label,
                "family": family,
                "parameters": 2_310_144,
                "train_tokens": tokens,
                "stages": stages,
            }
        )
    cells, bounds = {}, {}
    for index, arm in enumerate(arms):
        for task in TASKS:
            value = SCORES[task][index]
            half = {"translation": 2.4, "qa": 4.1, "code": 4.4}[task] * (0.1 if arm["family"] == "none" else 1)
            passes = 24.3 if arm["family"] != "diffusion" else 80.0
            cells.setdefault(arm["name"], {})[task] = {
                "value": value,
                "low": max(0.0, value - half),
                "high": value + half,
                "examples": 300,
                "secondary": {"exact_match": value * 0.8} if task == "qa" else {},
                "conditions": {
                    "sampler": "DenoisingSampler" if arm["family"] == "diffusion" else "AutoregressiveSampler",
                    "steps": 10,
                    "candidates": 8,
                    "temperature": 0.2,
                    "samples_per_prompt": 1,
                    "forward_passes_per_sample": passes,
                    "generated_tokens_per_sample": 14.2,
                    "oracle": None,
                },
            }
            kind = "pseudo" if arm["family"] == "diffusion" else "exact"
            bounds.setdefault(arm["name"], {})[task] = {
                "nll_per_real_token": 8.6 if index == 0 else 1.2 + 0.1 * index,
                "kind": kind,
            }
    labels = {
        "translation": ("Translation", "bleu", "BLEU"),
        "qa": ("Extractive QA", "squad", "F1"),
        "code": ("Code synthesis", "pass_at_k", "pass@1"),
    }
    return {
        "name": "quickstart",
        "title": "Autoregression, diffusion, and the road between",
        "notes": ["All arms share network, data order and optimizer.", "Made-up numbers."],
        "fingerprint": "3f9a1c44d0e2b7a85f60",
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "diffusion-lm": "0.1.0"},
        "arms": arms,
        "tasks": [
            {
                "name": t,
                "label": labels[t][0],
                "metric": labels[t][1],
                "metric_label": labels[t][2],
                "higher_is_better": True,
                "examples": 300,
            }
            for t in TASKS
        ],
        "cells": cells,
        "bounds": bounds,
    }


def curves() -> dict:
    generator = np.random.default_rng(0)
    found = {}
    for arm in results()["arms"]:
        reached = 8.6
        for stage in arm["stages"]:
            floor = (1.6 if stage["objective"] == "Denoising" else 1.2) * (0.6 if "tune" in stage["name"] else 1.4)
            rows = []
            for step in range(10, stage["steps"] + 1, 10):
                value = floor + (reached - floor) * math.exp(-step / 260) + generator.normal(0, 0.04)
                rows.append({"step": step, "loss": value * 2, "nll_per_real_token": value, "tokens_per_second": 9e3})
                if step % 400 == 0:
                    rows.append({"step": step, "bound": {"nll_per_real_token": value + 0.15, "loss": value}})
            found.setdefault(stage["name"], rows)
            reached = floor + (1.8 if stage["objective"] == "Autoregressive" and arm["family"] == "diffusion" else 0)
    return found


def speed() -> dict:
    rows = []
    for length in (16, 32, 64, 128, 256, 512):
        lines = [("autoregressive, KV cache", "ar", length, 0.004 + 0.0021 * length)]
        lines += [
            (f"diffusion, {steps} steps", "diffusion", steps, steps * (0.0042 + 0.00006 * length + 2.2e-8 * length**2))
            for steps in (5, 10, 20, 50)
        ]
        rows += [
            {
                "label": label,
                "family": family,
                "length": length,
                "batch_size": 1,
                "seconds": seconds,
                "spread": 0.12,
                "forward_passes": passes,
            }
            for label, family, passes, seconds in lines
        ]
    return {"device": "CPU, 2 cores", "rows": rows}


def samples() -> dict:
    shown = {}
    for task, sample in SAMPLES.items():
        outputs = {
            arm: {"text": text, "score": 100.0 if text == sample["reference"] else 37.5 - 5 * (index == 3)}
            for index, (arm, text) in enumerate(zip(ARMS, sample["outputs"], strict=True))
        }
        shown[task] = [{"input": sample["input"], "reference": sample["reference"], "outputs": outputs}] * 4
    return shown


def pieces(text: str) -> list[str]:
    """Something like what SentencePiece would give."""
    found = re.findall(r"\n| *\w{1,6}|\w+| *[^\w\s]", text)
    return [piece.replace(" ", "▁") for piece in found] + ["</s>"]


def playback() -> dict:
    generator = np.random.default_rng(3)
    finals = {
        "translation": pieces("La bibliothèque restera ouverte jusqu'à neuf heures du soir jeudi."),
        "qa": ["▁Ou", "aga", "dou", "gou", "</s>"],
        "code": pieces(CODE),
    }
    widths = {"translation": 32, "qa": 16, "code": 64}
    played = {}
    for task, final in finals.items():
        final = final + [""] * (widths[task] - len(final))
        words = sorted({*finals["translation"], *finals["code"], "▁petit", "ment", "▁self", "▁river", "tion"} - {"\n"})
        canvas = [str(generator.choice(words)) for _ in final]
        start, frames = list(canvas), []
        for step in range(10):
            keep = generator.random(len(final)) < min(1.0, 0.25 + 0.11 * step)
            canvas = [
                f if k else (c if generator.random() < 0.5 else str(generator.choice(words)))
                for f, c, k in zip(final, canvas, keep, strict=True)
            ]
            frames.append(list(final) if step > 7 else list(canvas))
        played[task] = {
            "arm": "ar2diff_800",
            "input": SAMPLES[task]["input"],
            "reference": SAMPLES[task]["reference"],
            "start": start,
            "frames": frames,
        }
    return played
