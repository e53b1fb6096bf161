"""Compares diffusion layouts with transformers' models of the same layers, and exported tokenizers with its loader."""

import io
import json

import diffusion_cases as cases
import huggingface_cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402
import sentencepiece  # noqa: E402
from make_diffusion import write  # noqa: E402

from diffusion_lm.data.vocabulary import Vocabulary  # noqa: E402
from diffusion_lm.interop.huggingface import load, save  # noqa: E402
from diffusion_lm.interop.tokenizer_export import tokenizer_files  # noqa: E402


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_are_those_of_the_model_with_another_attention_mask(name, tmp_path):
    model = cases.build(name)
    write(tmp_path / "in", name, model)
    tokens, block = cases.ids(), cases.CASES[name].block
    theirs = cases.reference(model, tokens, cases.seen(block))
    ours = cases.our_logits(load(tmp_path / "in"), tokens)
    assert np.abs(ours - theirs).max() < cases.TOLERANCE
    causal = cases.reference(model, tokens, np.tril(np.ones((tokens.shape[1],) * 2, bool)))
    assert np.abs(causal - theirs).max() > 0.1


@pytest.mark.parametrize("name", cases.CASES)
def test_the_export_is_the_same_torch_model(name, tmp_path):
    """The tensors load into a new model by their published names, each exactly once, bit for bit."""
    model = cases.build(name)
    write(tmp_path / "in", name, model)
    one = load(tmp_path / "in")
    save(
        tmp_path / "out",
        one.architecture,
        one.params,
        family=one.family,
        config=one.config,
        trained_as=one.diffusion.facts(),
    )
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    if name == "diffullama_denoiser":  # the published files have LLaMA's names
        expected = {key: weight.detach().numpy() for key, weight in model.named_parameters()}
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(again).__name__ == "LlamaForCausalLM"
    else:
        expected = cases.tensors(name, model)
    assert set(exported) == set(expected)
    for key, weight in expected.items():
        np.testing.assert_array_equal(exported[key], weight, err_msg=key)


@pytest.mark.parametrize(
    ("base", "family"), [("gpt2", "diffugpt"), ("llama", "llada"), ("qwen2_tied", "dream"), ("qwen3", "sdar")]
)
def test_an_autoregressive_checkpoint_exports_as_diffusion(base, family, tmp_path):
    """A run that starts from an AR model and does not train: logits with full attention agree."""
    model = huggingface_cases.build(base)
    model.save_pretrained(tmp_path / "in")
    one = load(tmp_path / "in")
    told = {"mask_token_id": 5, "block_size": 4}
    save(tmp_path / "out", one.architecture, one.params, family=family, trained_as=told)
    again = load(tmp_path / "out")
    assert (again.family, again.diffusion.mask_id) == (family, 5)
    model = type(model).from_pretrained(tmp_path / "in", attn_implementation="eager").eval()
    theirs = cases.reference(model, cases.ids(), cases.seen(again.diffusion.block_size))
    assert np.abs(cases.our_logits(again, cases.ids()) - theirs).max() < cases.TOLERANCE


LINES = [f"{number} plus {other} is  a  naïve test" for number in range(10, 60) for other in ("one", "two", "three")]
SPECIALS = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["<mask>", "<sep>"], minloglevel=2)
VOCABULARIES = {
    "unigram": dict(model_type="unigram", vocab_size=330, byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, user_defined_symbols=["\n", "\t"], split_digits=True),
    "bpe": dict(model_type="bpe", vocab_size=340, byte_fallback=True, remove_extra_whitespaces=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_transformers_loads_our_tokenizers(kind, tmp_path):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=stream, hard_vocab_limit=False, **SPECIALS, **VOCABULARIES[kind]
    )
    vocabulary = Vocabulary(stream.getvalue())
    for name, content in tokenizer_files(vocabulary).items():
        (tmp_path / name).write_bytes(content)
    # As beside a model: config.json of a layout that transformers does not know.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "architectures": ["LLaDAModelLM"]}))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (*LINES[::13], "  two  spaces ", "日本 and more", "a\nb\tc", ""):
        ids = vocabulary.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == vocabulary.decode(ids)
    specials = vocabulary.specials
    for role in ("pad", "eos", "bos", "mask"):
        assert getattr(tokenizer, f"{role}_token_id") == getattr(specials, f"{role}_id")
    assert len(tokenizer) == vocabulary.size


def test_auto_tokenizer_finds_the_files(tmp_path):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=stream,
        hard_vocab_limit=False,
        **SPECIALS,
        **VOCABULARIES["unigram"],
    )
    vocabulary = Vocabulary(stream.getvalue())
    for name, content in tokenizer_files(vocabulary).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(LINES[0])["input_ids"] == vocabulary.encode(LINES[0])
