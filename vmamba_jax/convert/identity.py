"""Says which model a file holds, and in what it differs from the one that was asked for."""

from typing import Any

from vmamba_jax.config import VMambaConfig, parse_forward_type
from vmamba_jax.registry import list_models, model_config

# The fields that weights depend on; num_classes and imgsize adapt.
_FIELDS = (
    *("depths", "dims", "ssm_ratio", "ssm_d_state", "ssm_dt_rank", "ssm_conv", "ssm_conv_bias"),
    *("forward_type", "ssm_act_layer", "mlp_ratio", "mlp_act_layer", "gmlp", "norm_layer"),
    *("patch_size", "in_chans", "patch_norm", "patchembed_version", "downsample_version"),
    *("post_norm", "posembed"),
)


def describe_difference(held: VMambaConfig, name: str, asked: VMambaConfig) -> str:
    """Both architectures by name, with the fields in which they differ.

    Args:
        held: the file's architecture.
        name: of the model asked for.
        asked: its architecture.

    Returns:
        Such as ``"vmamba_tiny_s2l5 (ssm_ratio 2), not vmamba_tiny_s1l8 (ssm_ratio 1)"``.
    """
    fields = differing_fields(held, asked)
    held_name = next(
        (known for known in list_models() if not differing_fields(held, model_config(known))),
        "a VMamba",
    )
    return f"{held_name} ({_values(held, fields)}), not {name} ({_values(asked, fields)})"


def differing_fields(held: VMambaConfig, asked: VMambaConfig) -> list[str]:
    """Names of the fields in which two architectures compute differently."""
    return [field for field in _FIELDS if _meaning(held, field) != _meaning(asked, field)]


def _meaning(config: VMambaConfig, field: str) -> Any:
    match field:
        case "forward_type":  # v0 is v05 with a gate; where the scan is in float32 is no difference
            variant = parse_forward_type(config.forward_type)
            operator = "m0" if variant.operator == "m0" else "v2"
            return variant._replace(operator=operator, force_fp32=False)
        case "norm_layer":
            return config.norm_layer == "bn"
        case "ssm_dt_rank":
            return [config.dt_rank(stage) for stage in range(len(config.stage_dims))]
        case _:
            return getattr(config, field)


def _values(config: VMambaConfig, fields: list[str]) -> str:
    return ", ".join(f"{field} {_shown(getattr(config, field))}" for field in fields)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
