"""Tiny tokenizers in the files of Hugging Face folders, trained with the libraries that these files come from."""

import io
import json
import pathlib

LINES = [
    "the cat sat on the mat and the dog sat on the log",
    "le chat s'est assis où l'été déçoit ; ça va ?",
    "def f(x):\n    return {x: [1, 2]}\n\tif x != 10: pass",
    "a mask is masked by the mask of a masked man </s> <s>",
] * 10

TEXTS = (
    "",
    " ",
    "   ",
    " the cat",
    "the cat ",
    "  the   cat  ",
    "l'été déçoit : où ça ?",
    "def f(x):\n\treturn {x: [1, 2]}\n\n",
    "\r\n\t\t",
    "😀 the 👩‍👩‍👧 cat 🤗",
    "e\u0301 \xa0 中文",
)
"""French, code with newlines, tabs and braces, emoji, spaces everywhere, nothing."""


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    """Writes each `name=object` as `name.json` and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def byte_level(specials=("<|endoftext|>",)):
    """Returns a GPT-2-like tokenizer of the library."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LINES, vocab_size=330, special_tokens=list(specials), show_progress=False)
    return tokenizer


def gpt2_folder(folder: pathlib.Path, specials=("<|endoftext|>",), **files) -> pathlib.Path:
    """Writes vocab.json and merges.txt."""
    write(folder, **files)
    byte_level(specials).save_model(str(folder))
    return folder


def json_folder(folder: pathlib.Path, specials=("<|endoftext|>",), **files) -> pathlib.Path:
    """Writes tokenizer.json with what must be ignored: a template, truncation and padding."""
    import tokenizers

    write(folder, **files)
    byte_level(specials).save(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = specials[0]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_token=end, pad_id=0)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bert_folder(folder: pathlib.Path, lowercase=True, **files) -> pathlib.Path:
    """Writes vocab.txt."""
    import tokenizers

    write(folder, **files)
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    tokenizer.train_from_iterator([*LINES, "The Cat"], vocab_size=200, show_progress=False)
    tokenizer.save_model(str(folder))
    return folder


def sentencepiece_folder(folder: pathlib.Path, name: str, *, size=300, **options) -> pathlib.Path:
    """Trains a SentencePiece model under the file name `name`; `options` are the trainer's, dicts become JSON files."""
    import sentencepiece

    write(folder, **{key: options.pop(key) for key in list(options) if isinstance(options[key], dict)})
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in LINES for line in text.split("\n")),
        model_writer=stream,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / name).write_bytes(stream.getvalue())
    return folder


def llama_folder(folder: pathlib.Path, **files) -> pathlib.Path:
    """Writes a tokenizer.model like LLaMA's: BPE with bytes, no PAD, no MASK."""
    options = dict(model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    return sentencepiece_folder(folder, "tokenizer.model", size=400, **options, **files)


def t5_folder(folder: pathlib.Path, **files) -> pathlib.Path:
    """Writes a spiece.model like T5's: no BOS, sentinels behind the model's pieces."""
    options = dict(unk_id=2, bos_id=-1, eos_id=1, pad_id=0)
    return sentencepiece_folder(folder, "spiece.model", **options, **files)


def xlmr_folder(folder: pathlib.Path, **files) -> pathlib.Path:
    """Writes a sentencepiece.bpe.model like XLM-R's, whose ids fairseq numbers anew."""
    options = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    return sentencepiece_folder(folder, "sentencepiece.bpe.model", **options, **files)
