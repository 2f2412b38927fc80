"""A VMamba and its backbone in plain PyTorch, straight from the names of their files.

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


def stages(state, image, start=""):
    """The maps (H, W, C) of an image (1, 3, H, W) after each stage; names begin with `start`."""

    def to_map(x):  # (1, C, H, W) -> (H, W, C)
        return x[0].permute(1, 2, 0).contiguous()

    x, stem = image, f"{start}patch_embed"
    x = convolve(state, f"{stem}.0", x, 2)
    x = gelu(channel_norm(state, f"{stem}.2", to_map(x))).permute(2, 0, 1)[None]
    x = convolve(state, f"{stem}.5", x, 2)
    x, stage = channel_norm(state, f"{stem}.7", to_map(x)), 0
    while f"{start}layers.{stage}.blocks.0.norm.weight" in state:
        layer, block = f"{start}layers.{stage}", 0
        while f"{layer}.blocks.{block}.norm.weight" in state:
            key = f"{layer}.blocks.{block}"
            x = x + ss2d(state, f"{key}.op", channel_norm(state, f"{key}.norm", x))
            hidden = linear(state, f"{key}.mlp.fc1", channel_norm(state, f"{key}.norm2", x))
            x = x + linear(state, f"{key}.mlp.fc2", gelu(hidden))
            block += 1
        yield x
        if f"{layer}.downsample.1.weight" in state:
            y = convolve(state, f"{layer}.downsample.1", x.permute(2, 0, 1)[None], 2)
            x = channel_norm(state, f"{layer}.downsample.3", to_map(y))
        stage += 1


def backbone(state, image):
    """The normalised maps (1, C, H, W) of the four stages."""
    return [
        channel_norm(state, f"backbone.outnorm{i}", x).permute(2, 0, 1)[None]
        for i, x in enumerate(stages(state, image, "backbone."))
    ]


class VMamba(torch.nn.Module):
    """A classifier with the modules and names of the released files.

    Args:
        shapes: of its parameters, by name.
    """

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *modules, leaf = name.split(".")
            module = self
            for part in modules:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape)))

    def forward(self, image):
        """Logits (1, classes) of an image (1, 3, H, W)."""
        state = dict(self.named_parameters())
        *_, last = stages(state, image)
        pooled = channel_norm(state, "classifier.norm", last).mean(dim=(0, 1))
        return linear(state, "classifier.head", pooled)[None]
