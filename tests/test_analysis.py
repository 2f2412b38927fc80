"""What a model looks at: receptive fields, activation maps, stage maps and other image sizes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vmamba_jax import VSSM, VMambaConfig
from vmamba_jax.analysis import activation, capture, erf, features, resolution
from vmamba_jax.analysis.scan_weights import scan_weights, standardise
from vmamba_jax.config import parse_forward_type
from vmamba_jax.ops import selective_scan_2d, ssd_2d

CONFIG = VMambaConfig(
    num_classes=5,
    depths=(1, 1),
    dims=(8, 16),
    ssm_d_state=2,
    ssm_ratio=1.0,
    forward_type="v05_noz",
    downsample_version="v3",
    mlp_ratio=2.0,
    imgsize=16,
)
ONE = CONFIG.replace(depths=(1,), dims=(8,), mlp_ratio=0.0)
HEIGHT, WIDTH = 3, 4


def model_of(config: VMambaConfig, shape: tuple[int, ...] = (1, 16, 24, 3)):
    model = VSSM(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))
    return model, variables


@pytest.fixture(scope="module")
def two_stages():
    return model_of(CONFIG)


def images_of(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, height, width, 3), np.float32)


def weights_of(forward_type: str, channels: int = 4, states: int = 2, rank: int = 2) -> dict:
    """Parameters of an SS2D's scan, far enough from their initial values to tell them apart."""
    rng = np.random.default_rng(1)
    lowered = parse_forward_type(forward_type).operator == "m0"
    shapes = {
        "x_proj_weight": (4, rank + 2 * states, channels),
        "dt_projs_bias": (4, rank if lowered else channels),
        "A_logs": (4, rank) if lowered else (4, channels, states),
        "Ds": (4, rank, channels // rank) if lowered else (4, channels),
    }
    if not lowered:
        shapes["dt_projs_weight"] = (4, channels, rank)
    return {k: 0.7 * rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


def dense_matrix(u: np.ndarray, weights: dict, route: int) -> np.ndarray:
    """M[q, j, c] of a sequence (L, C) read in its own order, as the formula says, in float64."""
    w = {name: array[route].astype(np.float64) for name, array in weights.items()}
    projected = u.astype(np.float64) @ w["x_proj_weight"].T
    rate = -np.exp(w["A_logs"])
    length, channels = u.shape
    if rate.ndim == 1:  # a rate for each head
        rank, states = len(rate), (projected.shape[-1] - len(rate)) // 2
        step = np.logaddexp(0, projected[:, :rank] + w["dt_projs_bias"])
        step = np.repeat(step, channels // rank, axis=1)
        rate = np.repeat(rate, channels // rank)[:, None] * np.ones(states)
    else:
        rank, states = w["dt_projs_weight"].shape[-1], rate.shape[-1]
        step = projected[:, :rank] @ w["dt_projs_weight"].T
        step = np.logaddexp(0, step + w["dt_projs_bias"])
    b, c = projected[:, rank : rank + states], projected[:, rank + states :]
    matrix = np.zeros((length, length, channels))
    for q in range(length):
        for j in range(q + 1):
            since = step[j + 1 : q + 1].sum(axis=0)
            decay = np.exp(rate * since[:, None])  # (C, N)
            matrix[q, j] = (c[q] * decay * b[j]).sum(axis=-1) * step[j]
    return matrix


def routes_over_map(forward_type: str) -> list[np.ndarray]:
    """For each route, the positions of the map (row by row) in the order of reading."""
    order = parse_forward_type(forward_type).scan_order
    numbers = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    rows, columns = numbers.ravel(), numbers.T.ravel()
    turned = np.rot90(numbers).ravel()
    return {
        "cross2d": [rows, columns, rows[::-1], columns[::-1]],
        "unidi": [rows, rows, rows, rows],
        "bidi": [rows, rows, rows[::-1], rows[::-1]],
        "rot90": [rows, turned, rows[::-1], turned[::-1]],
    }[order]


def scan_of(x: np.ndarray, weights: dict, forward_type: str) -> np.ndarray:
    """What the model's own operator gives, (H, W, C)."""
    variant = parse_forward_type(forward_type)
    w = {name: jnp.asarray(array) for name, array in weights.items()}
    if variant.operator == "m0":
        y = ssd_2d(jnp.asarray(x), w["x_proj_weight"], w["dt_projs_bias"], w["A_logs"], w["Ds"])
    else:
        y = selective_scan_2d(
            jnp.asarray(x), w["x_proj_weight"], w["dt_projs_weight"], w["dt_projs_bias"],
            w["A_logs"], w["Ds"], order=variant.scan_order,
        )  # fmt: skip
    return np.asarray(y[0])


QUERY = (1, 2)


@pytest.mark.parametrize("forward_type", ["v05_noz", "v051d", "v052d", "v052d3", "m0_noz"])
def test_activation_maps_times_the_input_are_the_scan(forward_type):
    weights = weights_of(forward_type)
    x = np.random.default_rng(2).standard_normal((1, HEIGHT, WIDTH, 4)).astype(np.float32)
    found = jax.jit(partial(scan_weights, forward_type=forward_type))(
        jnp.asarray(x), weights, query=jnp.asarray(QUERY)
    )
    # Route by route, against the dense matrix of the formula.
    flat, query = x.reshape(-1, 4), QUERY[0] * WIDTH + QUERY[1]
    for k, reading in enumerate(routes_over_map(forward_type)):
        matrix = dense_matrix(flat[reading], weights, k)
        expected = np.zeros_like(flat, np.float64)
        expected[reading] = matrix[list(reading).index(query)]
        given = np.asarray(found.routes[k]).reshape(-1, 4)
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.merged, found.routes.sum(axis=0), rtol=1e-6, atol=1e-6)
    # And all of them together, with the skip, against the model's operator.
    skip = weights["Ds"].reshape(4, 4).sum(axis=0) * x[0][QUERY]
    y = (np.asarray(found.merged) * x[0]).sum(axis=(0, 1)) + np.asarray(found.offset) + skip
    np.testing.assert_allclose(y, scan_of(x, weights, forward_type)[QUERY], rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_activation_maps_of_the_cascade_are_those_of_its_two_passes():
    weights = weights_of("v052dc")
    x = np.random.default_rng(2).standard_normal((1, HEIGHT, WIDTH, 4)).astype(np.float32)
    found = jax.jit(partial(scan_weights, forward_type="v052dc"))(
        jnp.asarray(x), weights, query=jnp.asarray(QUERY)
    )
    row, column = QUERY
    u = np.asarray(standardise(jnp.asarray(x)))[0]
    along = [dense_matrix(u[row], weights, 0), dense_matrix(u[row, ::-1], weights, 1)]
    expected = np.zeros((2, HEIGHT, WIDTH, 4))
    expected[0, row] = along[0][column]
    # The reversed route's output stays in its own reading order.
    expected[1, row, ::-1] = along[1][column]
    np.testing.assert_allclose(found.routes[:2], expected, rtol=1e-5, atol=1e-6)

    middle = np.empty_like(u)
    for i in range(HEIGHT):
        ahead = (dense_matrix(u[i], weights, 0) * u[i][None]).sum(axis=1)
        back = (dense_matrix(u[i, ::-1], weights, 1) * u[i, ::-1][None]).sum(axis=1)
        middle[i] = ahead + back + weights["Ds"][0] * u[i] + weights["Ds"][1] * u[i, ::-1]
    z = np.asarray(standardise(jnp.asarray(middle)))[:, column]
    expected = np.zeros((2, HEIGHT, WIDTH, 4))
    expected[0, :, column] = dense_matrix(z, weights, 2)[row]
    expected[1, ::-1, column] = dense_matrix(z[::-1], weights, 3)[row]
    np.testing.assert_allclose(found.routes[2:], expected, rtol=1e-4, atol=1e-5)

    skip = weights["Ds"][2] * z[row] + weights["Ds"][3] * z[::-1][row]
    y = (np.asarray(found.merged) * u).sum(axis=(0, 1)) + np.asarray(found.offset) + skip
    np.testing.assert_allclose(y, scan_of(x, weights, "v052dc")[QUERY], rtol=1e-4, atol=1e-4)


def test_activation_maps_of_a_model_are_those_of_what_its_scan_reads(two_stages):
    model, variables = two_stages
    (image,) = images_of(1)
    maps = activation.activation_maps(model, variables, image, [(1, 2), (0, 0)], stage=1)
    assert maps.routes.shape == (2, 4, 2, 3)
    assert maps.merged.shape == (2, 2, 3)

    @jax.jit
    def in_full(variables, image):
        x = capture.scan_input(model, variables, image[None], stage=1)
        weights = capture.block_weights(variables, 1, 0)
        return scan_weights(x, weights, CONFIG.forward_type, jnp.asarray((1, 2)))

    found = in_full(variables, jnp.asarray(image))
    np.testing.assert_allclose(maps.routes[0], jnp.abs(found.routes).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(maps.merged[0], jnp.abs(found.merged).mean(-1), rtol=1e-5)
    # The first position is reached by the reversed routes alone.
    assert not maps.routes[1, :2].at[:, 0, 0].set(0).any()
    assert maps.routes[1, 2:].all()


def test_what_the_scan_reads_is_what_makes_the_stage():
    config = ONE.replace(depths=(2,), forward_type="v05_noz_onnone")
    model, variables = model_of(config)
    model, images = model.clone(scan_blocks=True), jnp.asarray(images_of(2))

    def both(images):
        x = capture.scan_input(model, variables, images, stage=0, block=1)
        first = model.clone(config=config.replace(depths=(1,)))
        before = first.apply(variables, images, out_indices=(0,), method="features")[0]
        after = model.apply(variables, images, out_indices=(0,), method="features")[0]
        weights = capture.block_weights(variables, 0, 1)
        scanned = selective_scan_2d(
            x, weights["x_proj_weight"], weights["dt_projs_weight"], weights["dt_projs_bias"],
            weights["A_logs"], weights["Ds"],
        )  # fmt: skip
        return after, before + scanned @ weights["out_proj"]["kernel"]

    after, again = jax.jit(both)(images)
    np.testing.assert_allclose(after, again, rtol=1e-5, atol=1e-5)


def test_the_receptive_field_is_what_finite_differences_say():
    model, variables = model_of(ONE)
    images = images_of(4)
    batches = (images[:2], images[2:])
    field = erf.effective_receptive_field(model, variables, batches, position=(2, 1))
    assert field.shape == (16, 24)
    with pytest.raises(ValueError, match="images of one size"):
        erf.effective_receptive_field(model, variables, (images[:2], images_of(2, height=24)))

    @jax.jit
    def seen(images):
        features: Any = model.apply(variables, images, out_indices=(0,), method="features")
        return jax.nn.relu(features[0][:, 2, 1]).sum(axis=-1)

    rng, step = np.random.default_rng(3), 3e-3
    for row, column in [(9, 5), *zip(rng.integers(0, 16, 5), rng.integers(0, 24, 5), strict=True)]:
        total = np.zeros(4)
        for color in range(3):
            nudge = np.zeros_like(images)
            nudge[:, row, column, color] = step
            total += np.maximum(0, (seen(images + nudge) - seen(images - nudge)) / (2 * step))
        np.testing.assert_allclose(field[row, column], total.mean(), rtol=2e-2, atol=2e-3)


def test_a_convolution_without_a_scan_sees_what_its_kernels_reach():
    config = ONE.replace(ssm_ratio=0.0, mlp_ratio=1.0, patchembed_version="v2")
    model, variables = model_of(config)
    field = erf.effective_receptive_field(model, variables, [images_of(4)])
    seen = np.zeros_like(field, bool)
    # Two 3x3 convolutions of stride 2 around position (2, 3): seven pixels from 4 * 2 - 3.
    seen[5:12, 9:16] = True
    assert field[seen].all()
    assert not field[~seen].any()


def test_contribution_area_grows_with_the_share():
    field = np.zeros((9, 15), np.float32)
    field[4, 7], field[3, 8], field[0, 0] = 6, 3, 1
    assert erf.contribution_area(field, 0.6) == pytest.approx(1 / 135)
    assert erf.contribution_area(field, 0.7) == pytest.approx(9 / 135)
    assert erf.contribution_area(field, 1.0) == 1.0
    assert erf.contribution_area(field, 0.1, centre=(0, 0)) == pytest.approx(1 / 135)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: erf.effective_receptive_field(m, v, []), "there is none"),
        (lambda m, v: erf.effective_receptive_field(m, v, [images_of(1)], stage=2), "0 to 1"),
        (
            lambda m, v: erf.effective_receptive_field(m, v, [images_of(1)], position=(2, 0)),
            "which is 2x3",
        ),
        (lambda m, v: activation.activation_maps(m, v, images_of(1)[0], [(0, 3)]), "which is 2x3"),
        (
            lambda m, v: activation.activation_maps(m, v, images_of(1)[0], [(0, 0)], block=1),
            "the blocks 0 to 0",
        ),
        (lambda m, v: list(resolution.resolution_sweep(m, v, [])), "needs images"),
        (lambda m, v: erf.contribution_area(np.zeros((4, 4), np.float32), 0.5), "no pixel"),
    ],
)
def test_what_can_not_be_analysed_is_refused(two_stages, call, message):
    with pytest.raises(ValueError, match=message):
        call(*two_stages)


def test_stage_maps_norms_and_colors(two_stages):
    model, variables = two_stages
    maps = features.stage_maps(model, variables, images_of(2))
    assert [stage.shape for stage in maps] == [(2, 4, 6, 8), (2, 2, 3, 16)]
    norms = features.map_norm(maps[0])
    np.testing.assert_allclose(norms**2, (maps[0] ** 2).sum(-1), rtol=1e-5)
    colors = features.map_colors(maps[0])
    assert colors.shape == (2, 4, 6, 3)
    assert colors.min() == 0
    assert colors.max() == 1
    # Uncorrelated, and the most of the variance first.
    parts = colors.reshape(-1, 3) - colors.reshape(-1, 3).mean(axis=0)
    covariance = parts.T @ parts
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    line = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1) * np.ones(5, np.float32)
    np.testing.assert_allclose(features.map_colors(line)[..., 0], line[..., 0] / 11, atol=1e-6)
    assert not features.map_colors(line)[..., 1:].any()
    assert not features.map_colors(np.ones((1, 2, 2, 4), np.float32)).any()


def photographs(count: int) -> list:
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (count, 40, 48, 3), np.uint8)
    return [{"image": Image.fromarray(p), "label": i} for i, p in enumerate(pixels)]


def test_the_sweep_tells_costs_drift_and_accuracy():
    config = ONE.replace(posembed=True)
    model, variables = model_of(config, (1, 16, 16, 3))
    samples, told = photographs(3), []
    rows = list(
        resolution.resolution_sweep(
            model, variables, samples, (16, 24), labelled=True, batch_size=2, on_images=told.append
        )
    )
    assert [row.size for row in rows] == [16, 24]
    assert told == [2, 1] * 2
    assert rows[0].drift == 0
    assert rows[0].agreement == 1
    assert rows[1].drift > 0
    assert rows[1].flops > 2 * rows[0].flops
    assert all(row.seconds > 0 and row.memory > 0 for row in rows)
    images = jnp.stack([resolution.EvalTransform(16)(s["image"]) for s in samples])
    logits = jax.jit(model.apply)(variables, images)
    expected = np.mean(np.asarray(logits).argmax(-1) == np.arange(3))
    assert rows[0].accuracy == pytest.approx(expected)
