"""How the modules behave: shapes, modes, dtypes, initial values, and what they refuse."""

import functools
import math
import re
import subprocess
import sys

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax import VSSM, VMambaConfig, create_model, list_models, model_config, register_model
from vmamba_jax.config import _HEADS
from vmamba_jax.models.layers import BatchNorm, GatedMlp, linear_init, uniform_init

SMALL = VMambaConfig(
    depths=(1, 1), dims=(16, 32), num_classes=5, ssm_d_state=1, forward_type="v05_noz",
    downsample_version="v3", patchembed_version="v2", drop_path_rate=0.5,
)  # fmt: skip


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def init(config, images, seed=0):
    return jax.jit(VSSM(config).init)(jax.random.key(seed), images)


def run(config, variables, images, **options):
    """`apply`, compiled: far faster than op by op."""

    @jax.jit
    def apply(variables, images):
        return VSSM(config).apply(variables, images, **options)

    return apply(variables, images)


@functools.cache
def small_variables():
    return init(SMALL, draw(1, 16, 16, 3))


def shapes_of(config, size):
    """The stages' shapes, without computing anything."""
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    stages = tuple(range(len(config.depths)))

    def run(images):
        return VSSM(config).init_with_output(
            jax.random.key(0), images, out_indices=stages, method="features"
        )[0]

    return [m.shape for m in jax.eval_shape(run, images)]


@pytest.mark.parametrize("patchembed", ["v1", "v2"])
@pytest.mark.parametrize("downsample", ["v1", "v2", "v3", "none"])
@pytest.mark.parametrize("size", [(64, 64), (37, 50), (33, 63), (16, 95)])
def test_any_image_size_gives_the_maps_the_config_foretells(size, downsample, patchembed):
    config = VMambaConfig(
        depths=(1, 1, 1), dims=(8,) * 3 if downsample == "none" else (8, 12, 16),
        downsample_version=downsample, patchembed_version=patchembed,
    )  # fmt: skip
    expected = [(2, *config.feature_size(*size, stage=i), config.stage_dims[i]) for i in range(3)]
    assert shapes_of(config, size) == expected
    assert all(side >= 1 for shape in expected for side in shape)


@pytest.mark.parametrize("name", list_models())
def test_every_registered_model_maps_an_image_to_its_classes(name):
    config = model_config(name)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    logits, _ = jax.eval_shape(VSSM(config).init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, config.num_classes)


@pytest.mark.parametrize("head", _HEADS)
def test_forward_types_of_the_same_mathematics_are_the_same_program(head):
    # What each distinct program computes is checked against PyTorch in test_goldens.py.
    same_as = {"v31d": "v051d", "v32d": "v052d", "v32dc": "v052dc"}
    distinct = ("v051d", "v052d", "v052dc", "v052d3", "m0")
    twin = head if head in distinct else same_as.get(head, "v05")
    images = jax.ShapeDtypeStruct((1, 12, 16, 3), jnp.float32)
    programs = []
    for forward_type in (head, twin):
        config = SMALL.replace(
            depths=(1,), dims=16, forward_type=forward_type, ssm_conv_bias=True,
            ssm_init="v2" if head == "m0" else "v0",
        )  # fmt: skip
        model = VSSM(config)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        program = jax.make_jaxpr(model.apply)(variables, images)
        programs.append(re.sub("0x[0-9a-f]+", "", str(program)))
    assert programs[0] == programs[1]


def test_features_are_the_stages_maps_in_the_order_asked_for():
    images = draw(2, 20, 24, 3)
    last, first = run(SMALL, small_variables(), images, out_indices=(1, 0), method="features")
    assert first.shape == (2, 5, 6, 16)
    assert last.shape == (2, 3, 3, 32)
    params = {k: v for k, v in small_variables()["params"].items() if k != "head"}
    pooled = run(SMALL.replace(num_classes=0), {"params": params}, images)
    mean, var = last.mean(-1, keepdims=True), last.var(-1, keepdims=True)
    normalised = (last - mean) / jnp.sqrt(var + 1e-5)
    np.testing.assert_allclose(pooled, normalised.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_skips_samples_and_keeps_the_mean_scale():
    config = SMALL.replace(depths=(2,), dims=16, drop_path_rate=0.5)
    images = jnp.repeat(draw(1, 16, 16, 3), 16, axis=0)
    variables = init(config, images[:1])
    rngs = {"dropout": jax.random.key(1)}
    (maps,) = run(config, variables, images, train=True, rngs=rngs, out_indices=(0,))
    (calm,) = run(config, variables, images, out_indices=(0,))
    # The first block never skips; the second skips each of its two branches or not.
    distinct = np.unique(np.asarray(maps).reshape(16, -1).round(4), axis=0)
    assert 2 <= len(distinct) <= 4
    assert np.abs(maps - calm).max() > 1e-4  # a branch that stays is scaled up
    still = config.replace(drop_path_rate=0.0)
    np.testing.assert_array_equal(
        run(still, variables, images, train=True, out_indices=(0,)), [calm]
    )


def test_dropout_acts_in_training_only():
    config = SMALL.replace(drop_path_rate=0.0, ssm_drop_rate=0.3, mlp_drop_rate=0.3)
    images, rngs = draw(2, 16, 16, 3), {"dropout": jax.random.key(0)}
    calm = run(config, small_variables(), images)
    np.testing.assert_array_equal(calm, run(SMALL, small_variables(), images))
    noisy = run(config, small_variables(), images, train=True, rngs=rngs)
    assert np.abs(noisy - calm).max() > 1e-4


@pytest.mark.parametrize(
    "recompute", ["scan_inputs", pytest.param("blocks", marks=pytest.mark.exhaustive)]
)
def test_recomputation_changes_memory_and_nothing_else(recompute):
    images = draw(2, 16, 16, 3)

    def gradients(recompute):
        def loss(params):
            model = VSSM(SMALL, recompute=recompute)
            rngs = {"dropout": jax.random.key(3)}
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            return jnp.square(logits).sum()  # pyright: ignore[reportArgumentType]

        return jax.jit(jax.grad(loss))(small_variables()["params"])

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        gradients("activations"),
        gradients(recompute),
    )


def test_an_unknown_choice_of_what_to_recompute_is_refused():
    model = VSSM(SMALL, recompute="scan_input")
    with pytest.raises(ValueError, match=r"unknown recompute 'scan_input'.*scan_inputs"):
        jax.eval_shape(model.init, jax.random.key(0), draw(2, 16, 16, 3))


def test_post_norm_normalises_what_a_branch_returns():
    config = SMALL.replace(depths=(1,), dims=16, post_norm=True, drop_path_rate=0.0)
    images = draw(2, 16, 16, 3)
    params = init(config, images)["params"]
    # With its scale at zero, a post-norm branch adds nothing; a pre-norm one still would.
    block = dict(params["layers_0_blocks_0"])
    for norm in ("norm", "norm2"):
        block[norm] = {**block[norm], "scale": jnp.zeros(16)}
    silent = {"params": {**params, "layers_0_blocks_0": block}}
    (out,) = run(config, silent, images, out_indices=(0,))
    bare = config.replace(ssm_ratio=0.0, mlp_ratio=0.0)
    embed = {"params": {k: v for k, v in params.items() if "blocks" not in k}}
    (expected,) = run(bare, embed, images, out_indices=(0,))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_batch_norm_learns_its_statistics_in_training_only():
    config = SMALL.replace(norm_layer="bn", drop_path_rate=0.0)
    images = 3 + draw(4, 16, 16, 3)
    variables = init(config, images)
    _, updated = run(config, variables, images, train=True, mutable=["batch_stats"])
    _, kept = run(config, variables, images, mutable=["batch_stats"])

    def moved(after):
        change = jax.tree.map(
            lambda a, b: np.any(a != b), variables["batch_stats"], after["batch_stats"]
        )
        return set(map(bool, jax.tree.leaves(change)))

    assert moved(updated) == {True}
    assert moved(kept) == {False}


def test_low_precision_computes_low_and_stores_high():
    model, images = VSSM(SMALL, dtype=jnp.bfloat16), draw(1, 16, 16, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    watch = functools.partial(model.apply, capture_intermediates=True)
    logits, state = jax.eval_shape(watch, variables, images)
    seen = state["intermediates"]["layers_0_blocks_0"]
    assert seen["op"]["in_proj"]["__call__"][0].dtype == jnp.bfloat16
    assert seen["mlp"]["fc2"]["__call__"][0].dtype == jnp.bfloat16
    # What fc1 returns is its activation, in float32; its product is not.
    assert "bf16[16,64] = dot_general" in str(jax.make_jaxpr(model.apply)(variables, images))
    # The residual stream sums up what every block adds.
    assert seen["__call__"][0].dtype == logits.dtype == jnp.float32


def test_linen_modules_serve_nnx():
    config = SMALL.replace(depths=(1,), dims=8, mlp_ratio=0.0)
    model, images = VSSM(config), draw(1, 8, 8, 3)
    bridged = flax.nnx.bridge.ToNNX(model, rngs=flax.nnx.Rngs(0)).lazy_init(images)
    state = flax.nnx.state(bridged, flax.nnx.Param)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(expected))
    assert bridged(images).shape == (1, 5)


@pytest.mark.parametrize("init", ["v0", "v1", "v2"])
def test_initial_values_follow_pytorchs_distributions(init):
    config = VMambaConfig(
        depths=(1,), dims=(256,), ssm_d_state=16, ssm_init=init, forward_type="v05",
        num_classes=500, patchembed_version="v2", downsample_version="v3", ssm_conv_bias=True,
    )  # fmt: skip
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(VSSM(config).init)(jax.random.key(0), images)["params"]
    op, embed = params["layers_0_blocks_0"]["op"], params["patch_embed"]

    def is_uniform(x, low, high):
        tolerance = 5 * (high - low) / math.sqrt(x.size)
        assert low <= x.min()
        assert x.max() <= high
        assert abs(x.mean() - (low + high) / 2) < tolerance
        assert abs(x.std() - (high - low) / math.sqrt(12)) < tolerance

    def is_normal(x, std):
        assert abs(x.mean()) < 5 * std / math.sqrt(x.size)
        assert abs(x.std() / std - 1) < 5 / math.sqrt(x.size)
        assert np.abs(x).max() > 2.5 * std  # not cut at two deviations

    for kernel in (
        op["in_proj"],
        op["out_proj"],
        params["head"],
        params["layers_0_blocks_0"]["mlp"]["fc1"],
    ):
        is_normal(kernel["kernel"], 0.02)
    assert not params["head"]["bias"].any()
    for conv, fan_in in ((embed["conv1"], 27), (embed["conv2"], 9 * 128), (op["conv2d"], 9)):
        bound = fan_in**-0.5
        is_uniform(conv["kernel"], -bound, bound)
        is_uniform(conv["bias"], -bound, bound)
    is_uniform(op["x_proj_weight"], -(512**-0.5), 512**-0.5)
    assert (op["Ds"] == 1).all()
    assert (op["out_norm"]["scale"] == 1).all()
    if init == "v0":
        is_uniform(op["dt_projs_weight"], -0.25, 0.25)  # rank 16
        step = np.log(np.logaddexp(op["dt_projs_bias"], 0))
        is_uniform(step, math.log(1e-3) - 1e-4, math.log(1e-1) + 1e-4)
        np.testing.assert_allclose(
            jnp.exp(op["A_logs"]), np.broadcast_to(np.arange(1, 17), (4, 512, 16)), rtol=1e-6
        )
    elif init == "v1":
        is_normal(op["A_logs"], 1.0)
        is_normal(op["dt_projs_weight"], 0.1)
        is_normal(op["dt_projs_bias"], 0.1)
    else:
        assert not op["A_logs"].any()
        is_uniform(op["dt_projs_weight"], 0, 0.1)
        is_uniform(op["dt_projs_bias"], 0, 0.1)


def test_create_model_takes_overrides_and_a_key():
    model, variables = create_model(
        "vmamba_digits", num_classes=7, image_size=32, dtype=jnp.bfloat16,
        rng=jax.random.key(5), depths=(1,), dims=16, posembed=True,
    )  # fmt: skip
    assert model.config.num_classes == 7
    assert model.dtype == jnp.bfloat16
    assert variables["params"]["pos_embed"].shape == (1, 8, 8, 16)
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 7)


def test_unknown_names_are_refused_with_the_closest():
    with pytest.raises(
        ValueError, match=r"unknown model 'vmamba_tiny_s1l9'.*Did you mean 'vmamba_tiny_s1l8'"
    ):
        create_model("vmamba_tiny_s1l9")
    with pytest.raises(ValueError, match=r"unknown config field 'depth'.*Did you mean 'depths'"):
        create_model("vmamba_digits", depth=3)


def test_a_name_stands_for_one_architecture():
    register_model("test_only", SMALL)
    register_model("test_only", SMALL)
    with pytest.raises(ValueError, match="registered already"):
        register_model("test_only", SMALL.replace(num_classes=6))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((16, 16, 3)), r"must be \(B, H, W, 3\)"),
        (jnp.zeros((1, 3, 16, 16)), r"must be \(B, H, W, 3\), channels last, got \(1, 3, 16, 16\)"),
        (jnp.zeros((1, 16, 16, 3), jnp.uint8), "normalised floats, got uint8"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(VSSM(SMALL).apply, small_variables(), images)


def test_an_image_that_leaves_nothing_in_the_last_stage_is_refused():
    config = SMALL.replace(patchembed_version="v1", downsample_version="v2")
    images = jnp.zeros((1, 7, 64, 3))
    with pytest.raises(ValueError, match="7x64 are too small for 2 stages"):
        jax.eval_shape(VSSM(config).init, jax.random.key(0), images)


def test_a_position_embedding_refuses_another_size():
    config = SMALL.replace(posembed=True, imgsize=32)
    with pytest.raises(ValueError, match="8x8 patches and this image is 4x4"):
        jax.eval_shape(VSSM(config).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize("indices", [(0, 2), (-1,), ()])
def test_out_indices_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match="stages between 0 and 1"):
        VSSM(SMALL).apply(
            small_variables(), draw(1, 16, 16, 3), out_indices=indices, method="features"
        )


def test_importing_the_package_loads_nothing_but_the_core():
    heavy = "grain tyro orbax PIL sklearn matplotlib torch optax"
    code = f"import sys, vmamba_jax; print([m for m in {heavy.split()} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("patchembed_version", ["v1", "v2"])
def test_a_position_embedding_fits_the_map_of_an_odd_image(patchembed_version):
    config = SMALL.replace(posembed=True, imgsize=33, patchembed_version=patchembed_version)
    images = jnp.zeros((1, 33, 33, 3))
    shapes = jax.eval_shape(VSSM(config).init, jax.random.key(0), images)
    height, width = config.feature_size(33, 33, stage=0)
    assert shapes["params"]["pos_embed"].shape == (1, height, width, config.stage_dims[0])


def test_a_registered_model_has_its_own_classes_and_image_size():
    model, variables = create_model("vmamba_digits")
    assert (model.config.num_classes, model.config.imgsize) == (10, 32)
    assert variables["params"]["head"]["kernel"].shape == (64, 10)


def test_batch_norm_is_pytorchs_with_a_large_mean():
    x = np.random.default_rng(0).normal(1e4, 1, size=(2, 3, 4, 5))
    norm = BatchNorm(use_running_average=False)
    images = jnp.asarray(x, jnp.float32)
    variables = jax.tree.map(jnp.asarray, norm.init(jax.random.key(0), images))
    y, state = norm.apply(variables, images, mutable=["batch_stats"])
    exact = np.asarray(images, np.float64).reshape(-1, 5)
    standard = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 5), standard, atol=5e-3)
    running = 0.9 + 0.1 * exact.var(axis=0, ddof=1)
    np.testing.assert_allclose(np.asarray(state["batch_stats"]["var"]), running, rtol=1e-3)


def test_a_gated_mlp_computes_in_bfloat16():
    mlp = GatedMlp(8, dtype=jnp.bfloat16)
    x = draw(1, 2, 2, 6)
    y, _ = mlp.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(5,), (256,), (3, 3, 1, 40), (96, 192)])
def test_initial_values_are_those_of_the_shape_itself(shape):
    key = jax.random.key(3)
    normal, uniform = linear_init(key, shape), uniform_init(0.5)(key, shape)
    np.testing.assert_allclose(normal, 0.02 * jax.random.normal(key, shape), rtol=1e-6)
    expected = jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
    np.testing.assert_allclose(uniform, expected, rtol=1e-6, atol=1e-7)
