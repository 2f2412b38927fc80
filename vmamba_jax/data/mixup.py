"""Mixup, CutMix and label smoothing of a whole batch, on the device, inside the training step.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix:
Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019; the
pairing (an image with its mirror in the batch) and the smoothing are those of timm's batch mode.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.typing import Array, Float, Images, Int


def mix(
    key: Array,
    images: Images,
    labels: Int[Array, "B"],
    *,
    num_classes: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
    label_smoothing: float = 0.1,
    groups: int = 1,
) -> tuple[Images, Float[Array, "B num_classes"]]:
    """Mixes every image, and its label, with that of its mirror image in the batch.

    The first sample is mixed with the last, the second with the last but one, all by one weight
    lambda: by a weighted sum (Mixup) or by pasting one rectangle (CutMix), whose actual area then
    gives the weight of the labels.

    Args:
      key: random key.
      images: ``(B, H, W, C)``, floating point, normalised.
      labels: ``(B,)`` class indices.
      num_classes: length of a soft label.
      mixup_alpha: lambda of Mixup follows Beta(alpha, alpha); 0 switches Mixup off.
      cutmix_alpha: lambda of CutMix follows Beta(alpha, alpha); 0 switches CutMix off.
      switch_probability: of CutMix rather than Mixup where both are on.
      label_smoothing: share of a label's weight that is spread evenly over all classes.
      groups: independent groups of consecutive samples that the batch is split into, each with
        its own draws and its own mirror. The released recipe drew once per 128 images, one GPU's
        share of the batch. A multiple of the number of shards keeps the mixing on each device.

    Returns:
      The mixed images, ``(B, H, W, C)`` of the dtype given, and soft labels, ``(B, num_classes)``
      float32, whose rows sum to one.

    Raises:
      ValueError: ``groups`` does not divide the batch.
    """
    batch, height, width, _ = images.shape
    if batch % groups:
        raise ValueError(f"A batch of {batch} images can't be split into {groups} equal groups.")
    targets = _smooth_one_hot(labels, num_classes, label_smoothing)
    if not (mixup_alpha or cutmix_alpha):
        return images, targets
    switch_key, weight_key, box_key = jax.random.split(key, 3)

    probability = switch_probability if mixup_alpha and cutmix_alpha else float(not mixup_alpha)
    switch = jax.random.uniform(switch_key, (groups,)) < probability
    alpha = jnp.where(switch, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    own = jax.random.beta(weight_key, alpha, alpha)  # weight of an image's own pixels and label
    keep = jnp.broadcast_to(own[:, None, None], (groups, height, width))
    if cutmix_alpha:
        pasted = _random_boxes(box_key, 1 - own, height, width)
        keep = jnp.where(switch[:, None, None], (~pasted).astype(jnp.float32), keep)
        # The box may have been cut off by the border: the labels follow what was really pasted.
        own = jnp.where(switch, 1 - jnp.mean(pasted, axis=(1, 2), dtype=jnp.float32), own)

    grouped = images.reshape(groups, batch // groups, *images.shape[1:])
    keep = keep[:, None, :, :, None].astype(images.dtype)
    mixed = grouped * keep + grouped[:, ::-1] * (1 - keep)
    targets = targets.reshape(groups, batch // groups, num_classes)
    own = own[:, None, None]
    targets = targets * own + targets[:, ::-1] * (1 - own)
    return mixed.reshape(images.shape), targets.reshape(batch, num_classes)


def _smooth_one_hot(
    labels: Int[Array, "B"], num_classes: int, smoothing: float
) -> Float[Array, "B num_classes"]:
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def _random_boxes(key: Array, area: Float[Array, "groups"], height: int, width: int) -> Array:
    """Boolean ``(groups, height, width)``: boxes of the image's shape, centred anywhere in it.

    A box covers the share ``area`` of the image, less what lies outside, and has even sides.
    """
    y_key, x_key = jax.random.split(key)
    inside = []
    for axis_key, size in ((y_key, height), (x_key, width)):
        half = (size * jnp.sqrt(area)).astype(jnp.int32) // 2
        center = jax.random.randint(axis_key, area.shape, 0, size)
        at = jnp.arange(size)[None]
        inside.append((at >= (center - half)[:, None]) & (at < (center + half)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
