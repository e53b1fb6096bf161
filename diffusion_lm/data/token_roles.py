"""Which tokens of a vocabulary open, end, fill and mask a text: found in its files, or added behind its ids."""

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
"""How special tokens are spelt where no file says which token has which role."""


@dataclasses.dataclass(frozen=True)
class Role:
    """What one special token is.

    Attributes:
      name: one of `ROLES`.
      token: its id.
      piece: its spelling.
      how: "found" in the tokenizer's files, "added" behind their ids, or "reused": a token that is there for something
        else serves.
    """

    name: str
    token: int
    piece: str
    how: str

    def __str__(self) -> str:
        return f"{self.name.upper()} {self.piece} {self.token} ({self.how})"


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """What a vocabulary consists of, for people.

    Attributes:
      kind: the algorithm ("SentencePiece", "BPE", "WordPiece", "Unigram").
      size: number of tokens, those added included.
      base_size: number of tokens of the tokenizer's own files: rows that a checkpoint has trained.
      roles: the special tokens, in the order of `ROLES`; a role that nothing has is left out.
    """

    kind: str
    size: int
    base_size: int
    roles: tuple[Role, ...]

    def names(self, how: str) -> tuple[str, ...]:
        """Returns the roles that were "found", "added" or "reused"."""
        return tuple(role.name for role in self.roles if role.how == how)

    def __str__(self) -> str:
        added = f" ({self.size - self.base_size} of them added)" if self.size > self.base_size else ""
        return f"{self.kind}, {self.size:,} tokens{added}: {', '.join(map(str, self.roles))}"


def native_roles(model: TokenModel) -> dict[str, tuple[int, str]]:
    """Returns `{role: (id, how)}` of a model that nothing is added to: PAD may be UNK, and BOS be PAD (T5)."""
    roles = {name: (token, "found") for name, token in model.roles.items()}
    require(
        "eos" in roles,
        "the vocabulary has no end-of-sequence token",
        fix="Train it with an eos_id, or load it with Vocabulary.load, which adds one.",
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
    """Gives every role that diffusion needs to a token; what is missing is added behind the ids there are.

    PAD and MASK must be tokens of their own: a PAD that is also EOS could not be told from the end of a text. BOS may
    be another one: the decoder's start token, else a PAD that is there (T5), else EOS (GPT-2).

    Args:
      model: the tokeniser.
      candidates: names (spellings or ids) of each role in the files, best first.
      added: spellings of the tokens that stand behind the model's already; "" is an id that nothing has.
      decoder_start: id that opens the stream of a decoder, where the files say so.
      mask: a token (its spelling, a text of one token, or its id) that serves as MASK, as DiffuGPT's 10541
        (arXiv 2410.17891); None = find one or add one.

    Returns:
      `added` with what was added, and `{role: (id, "found" | "added" | "reused")}`.

    Raises:
      ConfigError: `mask` is no token, or one with another role.
    """
    behind = list(added)

    def find(name: str | int) -> int | None:
        if isinstance(name, int):
            return name if 0 <= name < model.size + len(behind) else None
        return model.size + behind.index(name) if name and name in behind else model.find(name)

    def first(role: str, taken: Sequence[int] = ()) -> int | None:
        known = [find(name) for name in candidates.get(role, ())]
        known.append(model.roles.get(role))
        spelt = [find(name) for name in SPELLINGS[role]]
        known += [token for token in spelt if token is not None and (token >= model.size or model.is_special(token))]
        return next((token for token in known if token is not None and token not in taken), None)

    def add(role: str) -> tuple[int, str]:
        named = [name for name in candidates.get(role, ()) if isinstance(name, str)]
        spellings = (*named, *SPELLINGS[role], *(f"<{role}_{number}>" for number in range(1000)))
        behind.append(next(name for name in spellings if find(name) is None))
        return model.size + len(behind) - 1, "added"

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
    return tuple(behind), roles


def _named_mask(model: TokenModel, name: str | int, token: int | None, others: Sequence[int]) -> int:
    if token is None and isinstance(name, str):
        tokens = model.encode(name)
        token = tokens[0] if len(tokens) == 1 else None
    if token is None:
        raise ConfigError(
            f"{name!r} is no token of the vocabulary, so that it cannot be its MASK",
            where="mask",
            fix=f"Give an id below {model.size} or the spelling of one token, or leave it out to have one added.",
        )
    require(
        token not in others,
        f"token {token} cannot be MASK: it is BOS, EOS, PAD or UNK already",
        where="mask",
        fix="Name an ordinary token, or leave it out to have one added.",
    )
    return token
