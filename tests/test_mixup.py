"""Mixup and CutMix against their definitions: areas, weights, labels, distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmamba_jax.data import mix

CLASSES = 7
BATCH, HEIGHT, WIDTH = 8, 10, 14
LABELS = jnp.array([0, 1, 2, 3, 4, 5, 6, 0], jnp.int32)
# The image of sample i is i + 1 everywhere, so every pixel of a mixture tells its weights.
IMAGES = jnp.broadcast_to(
    jnp.arange(1.0, BATCH + 1)[:, None, None, None], (BATCH, HEIGHT, WIDTH, 3)
)

DRAWS = 3000
METHODS = {"mixup": {"cutmix_alpha": 0.0}, "cutmix": {"mixup_alpha": 0.0}, "both": {}}


@functools.cache
def draws(method: str) -> tuple[np.ndarray, np.ndarray]:
    """Mixed images and labels of many keys, stacked."""
    function = functools.partial(mix, num_classes=CLASSES, **METHODS[method])
    run = jax.jit(jax.vmap(lambda key: function(key, IMAGES, LABELS)))
    images, targets = run(jax.random.split(jax.random.key(0), DRAWS))
    return np.asarray(images), np.asarray(targets)


@functools.partial(jax.jit, static_argnames="groups")
def mix_in_groups(key, images, labels, groups):
    return mix(key, images, labels, num_classes=CLASSES, groups=groups, label_smoothing=0.0)


def own_weight(targets: np.ndarray) -> np.ndarray:
    """Lambda of each draw, from the label of sample 1 (class 1) mixed with sample 6 (class 6)."""
    own, other = targets[:, 1, 1], targets[:, 1, 6]
    return (own - other + 0.9) / 1.8  # with smoothing 0.1 the two differ by 0.9 (2 lambda - 1)


def test_mixup_is_the_weighted_sum_with_the_mirror_image():
    images, targets = draws("mixup")
    own = own_weight(targets)
    forward = np.asarray(IMAGES)
    for draw, weight in enumerate(own[:200]):
        expected = weight * forward + (1 - weight) * forward[::-1]
        np.testing.assert_allclose(images[draw], expected, rtol=1e-5)


def test_mixup_weights_follow_the_beta_distribution():
    _, targets = draws("mixup")
    own = own_weight(targets)
    assert own.mean() == pytest.approx(0.5, abs=0.02)
    # Var of Beta(a, a) is 1 / (4 (2a + 1)); a = 0.8.
    assert own.var() == pytest.approx(1 / (4 * 2.6), rel=0.06)


def test_cutmix_pastes_one_rectangle_whose_area_weighs_the_labels():
    images, targets = draws("cutmix")
    own = own_weight(targets)
    forward = np.asarray(IMAGES)
    for draw, weight in enumerate(own[:200]):
        pasted = images[draw, 1, :, :, 0] == 7.0
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        if rows.size:
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # Every image gets the same rectangle, from its mirror image, untouched elsewhere.
        expected = np.where(pasted[None, :, :, None], forward[::-1], forward)
        np.testing.assert_array_equal(images[draw], expected)
        assert weight == pytest.approx(1 - pasted.mean(), abs=1e-5)


def test_cutmix_rectangles_have_the_drawn_size_where_nothing_is_cut_off():
    _, targets = draws("cutmix")
    own = own_weight(targets)
    # By simulation in NumPy from the definition, side by side.
    generator = np.random.default_rng(0)
    simulated = []
    for share in 1 - generator.beta(1.0, 1.0, 40000):
        sides = []
        for size in (HEIGHT, WIDTH):
            half = int(size * np.sqrt(share)) // 2
            center = generator.integers(size)
            sides.append(min(size, center + half) - max(0, center - half))
        simulated.append(1 - sides[0] * sides[1] / (HEIGHT * WIDTH))
    assert own.mean() == pytest.approx(np.mean(simulated), abs=0.01)
    np.testing.assert_allclose(
        np.quantile(own, [0.1, 0.25, 0.5, 0.75, 0.9]),
        np.quantile(simulated, [0.1, 0.25, 0.5, 0.75, 0.9]),
        atol=0.02,
    )


def test_the_switch_chooses_either_half_of_the_time():
    images, targets = draws("both")
    # CutMix leaves whole pixel values, Mixup (almost surely) none.
    whole = np.isin(images[:, 1, :, :, 0], (2.0, 7.0)).all((1, 2))
    assert whole.mean() == pytest.approx(0.5, abs=0.03)
    own = own_weight(targets)
    assert own[~whole].var() == pytest.approx(1 / (4 * 2.6), rel=0.1)  # Beta(0.8, 0.8)


def test_labels_are_smoothed_and_sum_to_one():
    for method in METHODS:
        _, targets = draws(method)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
        # The classes of neither image hold their share of the smoothing and no more.
        np.testing.assert_allclose(targets[:, 1, [0, 2, 3, 4, 5]], 0.1 / CLASSES, rtol=1e-5)
    images, targets = mix(
        jax.random.key(0), IMAGES, LABELS, num_classes=CLASSES, mixup_alpha=0.0, cutmix_alpha=0.0
    )
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_allclose(targets[2, 2], 0.9 + 0.1 / CLASSES, rtol=1e-6)


def test_groups_mix_among_themselves_with_their_own_draws():
    images, targets = mix_in_groups(jax.random.key(3), IMAGES, LABELS, groups=4)
    pixels = np.asarray(images).mean((1, 2, 3))
    weights = []
    for group in range(4):
        first, second = 2 * group, 2 * group + 1
        weight = float(targets[first, LABELS[first]])
        weights.append(weight)
        assert pixels[first] == pytest.approx(weight * (first + 1) + (1 - weight) * (second + 1))
        assert pixels[second] == pytest.approx(weight * (second + 1) + (1 - weight) * (first + 1))
    assert len({round(weight, 4) for weight in weights}) == 4


def test_the_result_is_a_pure_function_of_the_key():
    one, again, other = (
        mix_in_groups(jax.random.key(seed), IMAGES, LABELS, groups=4)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_half_precision_images_stay_half_precision():
    images, targets = jax.eval_shape(
        functools.partial(mix_in_groups, groups=2),
        jax.random.key(0),
        IMAGES.astype(jnp.bfloat16),
        LABELS,
    )
    assert images.dtype == jnp.bfloat16
    assert targets.dtype == jnp.float32


def test_groups_on_separate_devices_mix_to_the_same_numbers_without_communication():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    key = jax.device_put(jax.random.key(5), NamedSharding(mesh, PartitionSpec()))
    images, labels = jax.device_put((IMAGES, LABELS), sharding)
    compiled = mix_in_groups.lower(key, images, labels, groups=4).compile()
    for one, other in zip(
        compiled(key, images, labels),
        mix_in_groups(jax.random.key(5), IMAGES, LABELS, groups=4),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in str(compiled.as_text())


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="8 images can't be split into 3"):
        mix_in_groups(jax.random.key(0), IMAGES, LABELS, groups=3)
