"""The backbone of a VMamba in plain PyTorch, straight from the names of mmdetection's files.

Of the later releases only (``forward_type="v05_noz"``), and one picture at a time.
"""

import torch  # pyright: ignore[reportMissingImports]
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    conv2d,
    gelu,
    layer_norm,
    silu,
    softplus,
)
from torch.nn.functional import linear as product  # pyright: ignore[reportMissingImports]


def convolve(state, key, x, stride=1):
    """The convolution of this name; kernels of 3 are padded."""
    weight = state[f"{key}.weight"]
    return conv2d(x, weight, state[f"{key}.bias"], stride, weight.shape[-1] // 2)


def linear(state, key, x):
    """The linear layer of this name."""
    return product(x, state[f"{key}.weight"], state.get(f"{key}.bias"))


def channel_norm(state, key, x):
    """LayerNorm over the channels of a map (H, W, C)."""
    weight = state[f"{key}.weight"]
    return layer_norm(x, weight.shape, weight, state[f"{key}.bias"])


def selective_scan(x, delta, decay, into, out, skip):
    """The recurrence, step by step; x and delta are (K, C, L), into and out (K, N, L)."""
    steps = torch.exp(torch.einsum("kcl,kcn->lkcn", delta, decay))
    inputs = torch.einsum("kcl,knl->lkcn", delta * x, into)
    state, states = torch.zeros_like(inputs[0]), torch.empty_like(inputs)
    for i in range(len(steps)):
        state = torch.addcmul(inputs[i], steps[i], state, out=states[i])
    return torch.einsum("lkcn,knl->kcl", states, out) + skip[..., None] * x


def ss2d(state, key, x):
    """SS2D of a map (H, W, C)."""
    x = linear(state, f"{key}.in_proj", x).permute(2, 0, 1)
    channels, height, width = x.shape
    x = silu(conv2d(x[None], state[f"{key}.conv2d.weight"], padding=1, groups=channels)[0])
    routes = torch.stack([x.flatten(1), x.transpose(1, 2).flatten(1)])
    routes = torch.cat([routes, routes.flip(-1)])
    rank = state[f"{key}.dt_projs_weight"].shape[-1]
    projected = torch.einsum("kec,kcl->kel", state[f"{key}.x_proj_weight"], routes)
    states = (projected.shape[1] - rank) // 2
    delta, into, out = projected.split([rank, states, states], dim=1)
    delta = torch.einsum("kcr,krl->kcl", state[f"{key}.dt_projs_weight"], delta)
    delta = softplus(delta + state[f"{key}.dt_projs_bias"][..., None])
    decay = -torch.exp(state[f"{key}.A_logs"]).reshape(4, channels, states)
    y = selective_scan(routes, delta, decay, into, out, state[f"{key}.Ds"].reshape(4, channels))
    rows, columns = y[:2] + y[2:].flip(-1)
    y = rows.reshape(channels, height, width)
    y = y + columns.reshape(channels, width, height).transpose(1, 2)
    y = channel_norm(state, f"{key}.out_norm", y.permute(1, 2, 0).contiguous())
    return linear(state, f"{key}.out_proj", y)


def backbone(state, image):
    """The normalised maps (1, C, H, W) of the four stages."""

    def to_map(x):  # (1, C, H, W) -> (H, W, C)
        return x[0].permute(1, 2, 0).contiguous()

    x = convolve(state, "backbone.patch_embed.0", image, 2)
    x = gelu(channel_norm(state, "backbone.patch_embed.2", to_map(x))).permute(2, 0, 1)[None]
    x = convolve(state, "backbone.patch_embed.5", x, 2)
    x, maps = channel_norm(state, "backbone.patch_embed.7", to_map(x)), []
    for stage in range(4):
        layer, block = f"backbone.layers.{stage}", 0
        while f"{layer}.blocks.{block}.norm.weight" in state:
            key = f"{layer}.blocks.{block}"
            x = x + ss2d(state, f"{key}.op", channel_norm(state, f"{key}.norm", x))
            hidden = linear(state, f"{key}.mlp.fc1", channel_norm(state, f"{key}.norm2", x))
            x = x + linear(state, f"{key}.mlp.fc2", gelu(hidden))
            block += 1
        maps.append(channel_norm(state, f"backbone.outnorm{stage}", x).permute(2, 0, 1)[None])
        if stage < 3:
            y = convolve(state, f"{layer}.downsample.1", x.permute(2, 0, 1)[None], 2)
            x = channel_norm(state, f"{layer}.downsample.3", to_map(y))
    return maps
