import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import Hidden
from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.samplers.base import Window
from diffusion_lm.samplers.window_stats import window_token_stats


@pytest.mark.parametrize("alignment", [SamePosition(), Shifted()])
@pytest.mark.parametrize("chunk", [3, 4, 32])
def test_the_window_alone_gives_what_the_whole_row_gives(alignment, chunk):
    """Ragged windows, chunks that do not divide the length, drawn tokens."""
    batch = stubs.make_batch([2, 7, 3, 11], [8, 3, 1, 0], 11)
    hidden = Hidden(jnp.asarray(np.random.default_rng(0).normal(size=(4, 11, stubs.VOCAB)), jnp.float32))
    model = stubs.table_model(np.zeros((11, stubs.VOCAB)))
    keys = StreamKeys.create(0).per_token("test", batch.example_ids, batch.positions)

    @stubs.jit
    def run(hidden, keys):
        part = window_token_stats(
            model,
            hidden,
            Window.of(batch),
            alignment,
            keys_BT=keys,
            score_BT=batch.tokens,
            chunk=chunk,
            temperature=0.7,
        )
        whole = model.token_stats(
            hidden, keys_BT=alignment.to_slots(keys), temperature=0.7, score=alignment.to_slots(batch.tokens)
        )
        return part, jax.tree.map(alignment.to_tokens, whole)

    target = np.asarray(batch.target_mask)
    assert not target[3].any()
    part, whole = run(hidden, keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[target], b[target], rtol=1e-6), part, whole)


def test_chunks_behind_the_longest_window_are_skipped():
    rows_seen = []

    class Watched(stubs.BoundModel):
        def token_stats(self, hidden, **settings):
            jax.debug.callback(lambda: rows_seen.append(hidden.values_BTD.shape[1]))
            return super().token_stats(hidden, **settings)

    table = stubs.table_model(np.zeros((20, stubs.VOCAB)))
    batch = stubs.make_batch([12, 3], [5, 6], 20)
    hidden = Hidden(jnp.zeros((2, 20, stubs.VOCAB)))
    run = stubs.jit(
        lambda hidden: window_token_stats(
            Watched(table.architecture, {}),
            hidden,
            Window.of(batch),
            SamePosition(),
            keys_BT=None,
            score_BT=batch.tokens,
            chunk=4,
            temperature=0.0,
        )
    )
    jax.block_until_ready(run(hidden))
    jax.effects_barrier()
    assert rows_seen == [4, 4], "6 of 20 slots need 2 chunks of 4"
