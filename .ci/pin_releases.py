"""Fetches the nine released files and pins their SHA-256 in vmamba_jax/convert/released.sha256.

Run it from the repository where github.com can be reached, and commit what it wrote.
"""

from pathlib import Path

from vmamba_jax.convert import load_model, releases
from vmamba_jax.convert.identity import differing_fields
from vmamba_jax.convert.pretrained import cached_model
from vmamba_jax.registry import model_config

path = Path(releases.__file__).with_name(releases.PINNED)
lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
for name, release in releases.RELEASES.items():
    saved = load_model(cached_model(release.url))
    assert not differing_fields(saved.config, model_config(name)), f"{release.file} is no {name}"
    lines.append(f"{saved.provenance['sha256']}  {release.file}")
path.write_text("\n".join(lines) + "\n")
print(f"{path}: {len(releases.RELEASES)} files")
