"""Assigns the roles BOS, EOS, PAD, UNK and MASK to tokens of a vocabulary; adds tokens for missing roles."""

import dataclasses
from collections.abc import Mapping, Sequence

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.data.tokenizer_models import TokenModel

ROLES = ("bos", "eos", "pad", "unk", "mask")

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]", "<|mask|>", "<|mdm_mask|>"),
}
"""Common spellings of special tokens, used if no file assigns a role."""


@dataclasses.dataclass(frozen=True)
class Role:
    """One special token of a vocabulary.

    Attributes:
      name: one of `ROLES`.
      token: its id.
      piece: its spelling.
      how: "found" in the tokenizer's files, "added" after their ids, or "reused": a token with another purpose takes
        the role.
    """

    name: str
    token: int
    piece: str
    how: str

    def __str__(self) -> str:
        return f"{self.name.upper()} {self.piece} {self.token} ({self.how})"


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """Summary of a vocabulary, for messages.

    Attributes:
      kind: the algorithm ("SentencePiece", "BPE", "WordPiece", "Unigram").
      size: number of tokens, including added ones.
      base_size: number of tokens in the tokenizer's files: the trained embedding rows of its checkpoint.
      roles: the special tokens, in the order of `ROLES`; unassigned roles are left out.
    """

    kind: str
    size: int
    base_size: int
    roles: tuple[Role, ...]

    def names(self, how: str) -> tuple[str, ...]:
        """Returns the names of the roles that were "found", "added" or "reused"."""
        return tuple(role.name for role in self.roles if role.how == how)

    def __str__(self) -> str:
        added = f" ({self.size - self.base_size} of them added)" if self.size > self.base_size else ""
        return f"{self.kind}, {self.size:,} tokens{added}: {', '.join(map(str, self.roles))}"


def native_roles(model: TokenModel) -> dict[str, tuple[int, str]]:
    """Returns `{role: (id, how)}` of a model without added tokens. PAD may reuse UNK, and BOS may reuse PAD (T5)."""
    roles = {name: (token, "found") for name, token in model.roles.items()}
    require(
        "eos" in roles,
        "the vocabulary has no end-of-sequence token",
        fix="Train it with an eos_id, or use Vocabulary.load, which adds one.",
    )
    if "pad" not in roles:
        roles["pad"] = (roles["unk"][0], "reused")
    if "bos" not in roles:
        roles["bos"] = (roles["pad"][0], "reused")
    return roles


def assign_roles(
    model: TokenModel,
    candidates: Mapping[str, Sequence[str | int]],
    added: Sequence[str] = (),
    *,
    decoder_start: int | None = None,
    mask: str | int | None = None,
) -> tuple[tuple[str, ...], dict[str, tuple[int, str]]]:
    """Assigns every role that diffusion needs to a token; tokens for missing roles are added after the existing ids.

    PAD and MASK must be separate tokens: a PAD equal to EOS could not be distinguished from the end of a text. BOS may
    reuse another token: the decoder's start token, else an existing PAD (T5), else EOS (GPT-2).

    Args:
      model: the tokenizer.
      candidates: spellings or ids of each role in the files, best first.
      added: spellings of tokens already added after those of the model; "" is an unused id.
      decoder_start: id of the decoder's start token, if the files give one.
      mask: a token to use as MASK (its spelling, a text that encodes to it, or its id), such as DiffuGPT's 10541
        (arXiv 2410.17891); None = find or add one.

    Returns:
      `added` including new tokens, and `{role: (id, "found" | "added" | "reused")}`.

    Raises:
      ConfigError: `mask` is not a token, or has another role.
    """
    extra = list(added)

    def find(name: str | int) -> int | None:
        if isinstance(name, int):
            return name if 0 <= name < model.size + len(extra) else None
        return model.size + extra.index(name) if name and name in extra else model.find(name)

    def first(role: str, taken: Sequence[int] = ()) -> int | None:
        known = [find(name) for name in candidates.get(role, ())]
        known.append(model.roles.get(role))
        # A common spelling counts only if the token is special: "<s>" may also be ordinary text.
        spelt = [find(name) for name in SPELLINGS[role]]
        known += [token for token in spelt if token is not None and (token >= model.size or model.is_special(token))]
        return next((token for token in known if token is not None and token not in taken), None)

    def add(role: str) -> tuple[int, str]:
        named = [name for name in candidates.get(role, ()) if isinstance(name, str)]
        spellings = (*named, *SPELLINGS[role], *(f"<{role}_{number}>" for number in range(1000)))
        extra.append(next(name for name in spellings if find(name) is None))
        return model.size + len(extra) - 1, "added"

    def found_or_added(role: str, taken: Sequence[int] = ()) -> tuple[int, str]:
        token = first(role, taken)
        return add(role) if token is None else (token, "found")

    roles: dict[str, tuple[int, str]] = {}
    named = None if mask is None else find(mask)
    bos, unknown = first("bos"), first("unk")
    if unknown is not None:
        roles["unk"] = (unknown, "found")
    roles["eos"] = found_or_added("eos")
    others = [token for token in (bos, unknown, roles["eos"][0]) if token is not None]
    roles["pad"] = found_or_added("pad", others)
    others.append(roles["pad"][0])
    if mask is None:
        roles["mask"] = found_or_added("mask", others)
    else:
        roles["mask"] = (_named_mask(model, mask, named, others), "reused")
    if bos is not None:
        roles["bos"] = (bos, "reused" if bos == roles["eos"][0] else "found")
    elif decoder_start is not None and find(decoder_start) is not None:
        roles["bos"] = (decoder_start, "reused")
    else:
        roles["bos"] = (roles["pad" if roles["pad"][1] == "found" else "eos"][0], "reused")
    return tuple(extra), roles


def _named_mask(model: TokenModel, name: str | int, token: int | None, others: Sequence[int]) -> int:
    if token is None and isinstance(name, str):
        tokens = model.encode(name)
        token = tokens[0] if len(tokens) == 1 else None
    if token is None:
        raise ConfigError(
            f"mask={name!r}: not a token of the vocabulary",
            where="mask",
            fix=f"Give an id below {model.size} or the spelling of one token, or omit it to add a MASK token.",
        )
    require(
        token not in others,
        f"mask={name!r}: token {token} is already BOS, EOS, PAD or UNK",
        where="mask",
        fix="Give an ordinary token, or omit it to add a MASK token.",
    )
    return token
