"""The architecture config: what it accepts, what it normalises, what it refuses."""

import itertools

import pytest

from vmamba_jax import VMambaConfig
from vmamba_jax.config import _HEADS, parse_forward_type

HEADS = tuple(_HEADS)


@pytest.mark.parametrize("head", HEADS)
def test_every_forward_type_is_known(head):
    order = {
        "v051d": "unidi",
        "v31d": "unidi",
        "v052d": "bidi",
        "v32d": "bidi",
        "v052dc": "cascade2d",
        "v32dc": "cascade2d",
        "v052d3": "rot90",
    }
    parsed = parse_forward_type(head)
    assert parsed.scan_order == order.get(head, "cross2d")
    assert parsed.gate
    assert parsed.gate_act
    assert not parsed.out_act
    assert parsed.out_norm == "layernorm"
    assert parsed.force_fp32 == (head in ("v0", "v0seq", "v01", "v02", "v03", "v2"))


def test_postfixes_may_come_in_any_order():
    postfixes = ("noz", "nozact", "oact", "no32", "ondwconv3")
    parsed = {
        parse_forward_type("_".join(("v01", *order))) for order in itertools.permutations(postfixes)
    }
    assert len(parsed) == 1
    (only,) = parsed
    assert (only.gate, only.gate_act, only.out_act) == (False, False, True)
    assert (only.out_norm, only.force_fp32) == ("dwconv3", False)


def test_lists_and_an_int_become_tuples_and_the_value_hashes():
    ported = VMambaConfig(depths=[2, 2, 5, 2], dims=96, norm_layer="LN2D")
    assert ported == VMambaConfig(depths=(2, 2, 5, 2), dims=(96, 192, 384, 768), norm_layer="ln2d")
    assert {ported: 1}[
        VMambaConfig(depths=(2, 2, 5, 2), dims=[96, 192, 384, 768], norm_layer="ln2d")
    ]


def test_the_delta_rank_is_resolved_per_stage():
    config = VMambaConfig(dims=40)
    assert [config.dt_rank(i) for i in range(4)] == [3, 5, 10, 20]
    assert VMambaConfig(ssm_dt_rank=7).dt_rank(3) == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"forward_type": "v06"}, "unknown forward_type 'v06'.*Did you mean 'v0'.*Accepted: v0,"),
        ({"forward_type": "v05_nos"}, "unknown postfix '_nos'.*Did you mean 'noz'"),
        ({"forward_type": "v05_onnone_oncnorm"}, "names 2 output norms"),
        ({"forward_type": "v0_noz"}, "takes no postfix"),
        ({"norm_layer": "gn"}, "unknown norm_layer 'gn'.*Accepted: ln, ln2d, bn"),
        ({"downsample_version": "v4"}, "unknown downsample_version"),
        ({"ssm_act_layer": "swish"}, "unknown ssm_act_layer"),
        ({"depths": ()}, "depths must be"),
        ({"depths": (2, 0)}, "depths must be"),
        ({"dims": (96, 192)}, "dims has 2 stages and depths has 4"),
        ({"dims": 0}, "dims must be positive"),
        ({"ssm_dt_rank": 0}, "ssm_dt_rank must be"),
        ({"ssm_conv": 4}, "ssm_conv must be odd"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must lie in"),
        ({"downsample_version": "none"}, "same dims in every stage"),
        ({"forward_type": "m0"}, "needs ssm_init 'v1' or 'v2'"),
        ({"forward_type": "m0", "ssm_init": "v2", "ssm_dt_rank": 5}, "multiple of ssm_dt_rank"),
        ({"patchembed_version": "v2", "patch_size": 3}, "needs an even patch_size"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_a_value_that_no_model_can_have_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        VMambaConfig(**overrides)


def test_an_unknown_override_names_the_closest_field():
    with pytest.raises(ValueError, match=r"unknown config field 'dim'.*Did you mean 'dims'"):
        VMambaConfig().replace(dim=96)
