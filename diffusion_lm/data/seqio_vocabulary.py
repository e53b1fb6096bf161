"""A SeqIO vocabulary for the features of a task, backed by `Vocabulary`. Needs TensorFlow."""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from diffusion_lm.data.vocabulary import Vocabulary


class LazyVocabulary(seqio.Vocabulary):
    """Loads a vocabulary when a task first uses it, not when the task is registered.

    Two objects are equal if they have the same `load` function.

    Args:
      load: finds or trains the vocabulary; called once.
    """

    def __init__(self, load: Callable[[], Vocabulary]):
        super().__init__(extra_ids=0)
        self._load = load

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, loaded on first access."""
        return self._load()

    @property
    def bos_id(self) -> int:
        """Id of BOS."""
        return self.vocabulary.specials.bos_id

    @property
    def eos_id(self) -> int:
        """Id of EOS."""
        return self.vocabulary.specials.eos_id

    @property
    def pad_id(self) -> int:
        """Id of PAD; unlike in SeqIO's own vocabularies it need not be 0."""
        return self.vocabulary.specials.pad_id

    @property
    def unk_id(self) -> int | None:
        """Id of UNK; None if every text can be encoded."""
        return self.vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Returns the ids i32[n] of one text; bytes that are not UTF-8 are read as U+FFFD."""

        def encode(text: bytes | np.ndarray) -> np.ndarray:
            plain = np.asarray(text, object).item()  # bytes in graph mode, a 0-d array in eager mode
            return np.asarray(self.vocabulary.encode(plain.decode("utf-8", errors="replace")), np.int32)

        tokens = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        tokens.set_shape([None])
        return tokens

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns a string tensor [...] for ids [..., n]."""

        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self.vocabulary.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.asarray(texts, object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyVocabulary) and self._load is other._load

    __hash__ = None  # type: ignore[assignment]
