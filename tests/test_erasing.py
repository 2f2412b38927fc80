"""Random erasing against its definition: shares, shapes, noise, places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.data import random_erasing

KEY = jax.random.key(0)
ORIGINAL = np.full((2000, 64, 48, 3), 9.0, np.float32)


@pytest.fixture(scope="module")
def erased() -> np.ndarray:
    return np.asarray(jax.jit(random_erasing)(KEY, ORIGINAL))


def test_one_full_rectangle_of_the_promised_share_and_shape_is_erased(erased: np.ndarray):
    changed = np.any(erased != ORIGINAL, axis=-1)
    shares, hit = changed.mean(axis=(1, 2)), changed.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=0.03)
    assert 0.015 < shares[hit].min() < 0.03
    assert 0.30 < shares.max() < 0.345
    assert shares[hit].mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    ratios, tops = [], []
    for one in changed[hit]:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        box = one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        ratios.append(box.shape[0] / box.shape[1])
        tops.append(rows[0] / max(64 - box.shape[0], 1))
    assert 0.25 < min(ratios) < 0.4
    assert 2.4 < max(ratios) < 3.8
    assert np.mean(tops) == pytest.approx(0.5, abs=0.05)
    assert (min(tops), max(tops)) == (0, 1)


def test_the_noise_is_normal_for_each_pixel_and_channel(erased: np.ndarray):
    values = erased[np.any(erased != ORIGINAL, axis=-1)]
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.01


def test_what_never_fits_leaves_the_images_alone():
    for images, probability in ((ORIGINAL[:4, :1], 1.0), (ORIGINAL[:4], 0.0)):
        kept = random_erasing(KEY, jnp.asarray(images), probability=probability)
        np.testing.assert_array_equal(kept, images)
