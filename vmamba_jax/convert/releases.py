"""The released ImageNet checkpoints: where they are, and what their files' hashes must be."""

import urllib.parse
from importlib import resources
from typing import NamedTuple

PINNED = "released.sha256"
"""Hashes of the released files beside this module, as sha256sum writes them."""


class Release(NamedTuple):
    """A checkpoint of the VMamba authors, trained on ImageNet-1K at 224 x 224.

    Attributes:
        tag: of the GitHub release.
        file: its name there.
        top1: ImageNet top-1 accuracy as published, in per cent.
    """

    tag: str
    file: str
    top1: float

    @property
    def url(self) -> str:
        """Where it is."""
        tag = urllib.parse.quote(self.tag)
        return f"https://github.com/MzeroMiko/VMamba/releases/download/{tag}/{self.file}"


RELEASES = {
    "vanilla_vmamba_tiny": Release("#v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2),
    "vanilla_vmamba_small": Release("#v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
    "vanilla_vmamba_base": Release("#v0cls", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
    "vmamba_tiny_s2l5": Release("#v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
    "vmamba_small_s2l15": Release("#v2cls", "vssm_small_0229_ckpt_epoch_222.pth", 83.6),
    "vmamba_base_s2l15": Release("#v2cls", "vssm_base_0229_ckpt_epoch_237.pth", 83.9),
    "vmamba_tiny_s1l8": Release("#v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
    "vmamba_small_s1l20": Release("#v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
    "vmamba_base_s1l20": Release("#v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
}


def pinned_sha256(url: str) -> str | None:
    """The SHA-256 that a released file must have; None for another file, or one not pinned yet."""
    text = resources.files("vmamba_jax.convert").joinpath(PINNED).read_text("utf-8")
    lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
    hashes = {file: digits for digits, file in lines}
    files = {release.url: release.file for release in RELEASES.values()}
    return hashes.get(files.get(url, ""))
