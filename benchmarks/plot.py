"""Draws results/model.svg from results/model.json: images a second, ours and the peer's."""

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
from _measure import RESULTS

mpl.rcParams["svg.hashsalt"] = "vmamba_jax"  # the same file for the same numbers


def main() -> None:
    """Reads, draws, writes."""
    results = json.loads((RESULTS / "model.json").read_text())
    rows = results["rows"]
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        axes.barh(place - 0.2, row["img/s"], 0.38, color="#3367d6")
        label = f" {row['img/s']:.1f}"
        if "peer img/s" in row:
            axes.barh(place + 0.2, row["peer img/s"], 0.38, color="#c0c4cc")
            axes.text(row["peer img/s"], place + 0.2, f" {row['peer img/s']:.2f}", va="center")
            label += f"  ({row['times peer']:.1f}x)"
        axes.text(row["img/s"], place - 0.2, label, va="center")
    modes = [r["mode"].replace("train", "training step") for r in rows]
    names = [f"{r['model']}\n{m}, batch {r['batch']}" for r, m in zip(rows, modes, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.2 * max(r["img/s"] for r in rows))
    axes.set_xlabel("images a second, 224 x 224, float32, 2 CPU cores")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        ["vmamba_jax", "PyTorch VMamba"], loc="upper left", bbox_to_anchor=(1, 1), frameon=False
    )
    figure.savefig(RESULTS / "model.svg", metadata={"Date": None})
    print(f"wrote {RESULTS / 'model.svg'}")


if __name__ == "__main__":
    main()
