"""The PyTorch baseline: the child process of `children.torch_child`, which trains or decodes with transformers.

The interpreter that runs it needs torch and transformers but not this package, so only these two and the standard
library are imported. The baseline is meant to be strong: fused AdamW, no dropout, no KV cache in training,
scaled-dot-product attention, and `generate` with a KV cache that never stops early. It runs in eager mode, the default
of transformers.
"""

import json
import os
import resource
import sys
import time
from typing import Any

LABEL = "transformers"


class Train:
    """Training steps of a causal language model."""

    def __init__(self, torch, model, request):
        """Reads `request`: {"tokens": i64[n,B,T] as lists, "conditioning", "steps", "optimizer"}."""
        self.torch, self.model, self.steps = torch, model.train(), request["steps"]
        device = next(model.parameters()).device
        self.tokens = [torch.tensor(rows, device=device) for rows in request["tokens"]]
        self.labels = [rows.clone() for rows in self.tokens]
        for labels in self.labels:
            # -100 excludes the conditioning from the loss of transformers.
            labels[:, : request["conditioning"]] = -100
        settings = dict(request["optimizer"])
        self.clip_norm = settings.pop("clip_norm")
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
        self.taken = 0

    def first(self):
        """Takes the first step and returns its loss."""
        return {"first_loss": float(self.step())}

    def step(self):
        """Takes one step and returns its loss without waiting for it."""
        tokens, labels = (lists[self.taken % len(lists)] for lists in (self.tokens, self.labels))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        if self.clip_norm is not None:
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.taken += 1
        return loss.detach()

    def round(self):
        """Takes the steps of one round; returns their number, by which the time is divided."""
        for _ in range(self.steps):
            self.step()
        return self.steps


class Decode:
    """Greedy decoding with a KV cache."""

    def __init__(self, torch, model, request):
        """Reads `request`: {"tokens": i64[B,P] as lists, "new_tokens"}."""
        self.torch, self.model, self.request = torch, model.eval(), request
        self.tokens = torch.tensor(request["tokens"], device=next(model.parameters()).device)
        settings = model.generation_config
        # Without an EOS id, `generate` never stops early.
        settings.eos_token_id, settings.pad_token_id = None, 0
        settings.do_sample, settings.num_beams, settings.use_cache = False, 1, True

    def first(self):
        """Decodes once and returns the new tokens."""
        return {"window": self.decode()[:, self.tokens.shape[1] :].tolist()}

    def decode(self):
        """Returns the prompts with completions of exactly `new_tokens` tokens."""
        count = self.request["new_tokens"]
        with self.torch.inference_mode():
            out = self.model.generate(
                self.tokens, attention_mask=self.torch.ones_like(self.tokens), max_new_tokens=count
            )
        assert out.shape[1] == self.tokens.shape[1] + count, "generate stopped early"
        return out

    def round(self):
        """Decodes one batch; returns 1, by which the time is divided."""
        self.decode()
        return 1


def load(torch, transformers, request):
    """Loads a checkpoint in float32 without dropout."""
    config = transformers.AutoConfig.from_pretrained(request["model"])
    for name in list(vars(config)):
        # Dropout fields have different names per model: resid_pdrop, attention_dropout, ...
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    device = "cuda" if request["platform"] == "gpu" and torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(request["model"], config=config).to(device)


def peak_memory(torch, device):
    """Returns the peak memory of the GPU, or of this process without one, in bytes."""
    if device.type == "cuda":
        return {"peak_memory": torch.cuda.max_memory_allocated(), "peak_memory_of": "device"}
    factor = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
    return {"peak_memory": used, "peak_memory_of": "process"}


def main():
    """Answers one JSON request per line of stdin on stdout."""
    # Redirect descriptor 1 to stderr, so that output of libraries does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task: Any = None
    subject: Any = None
    model: Any = None

    def reply(**answer):
        answers.write(json.dumps(answer, allow_nan=False) + "\n")

    for line in sys.stdin:
        question = json.loads(line)
        do = question["do"]
        if do == "greet":
            try:
                import torch
                import transformers
            except ImportError as error:
                reply(error=f"{sys.executable} cannot import {error.name or 'torch'}")
                return
            task = question["task"]
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            reply(labels=[LABEL], threads=torch.get_num_threads(), **versions)
        elif do == "prepare":
            with open(question["export"], encoding="utf-8") as stream:
                request = json.load(stream)
            transformers.logging.set_verbosity_error()
            model = load(torch, transformers, request)
            started = time.perf_counter()
            subject = (Train if task == "train" else Decode)(torch, model, request)
            facts = subject.first()
            reply(
                first_call_seconds=time.perf_counter() - started,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                model=type(model).__name__,
                attention=str(getattr(model.config, "_attn_implementation", "")),
                **facts,
            )
        elif do == "measure":
            device = next(model.parameters()).device
            started = time.perf_counter()
            count = subject.round()
            if device.type == "cuda":
                torch.cuda.synchronize()  # CUDA kernels run asynchronously
            reply(seconds=(time.perf_counter() - started) / count)
        elif do == "finish":
            reply(**peak_memory(torch, next(model.parameters()).device))


if __name__ == "__main__":
    main()
