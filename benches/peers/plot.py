"""Draws `summary.json`: one panel per test, one bar per contestant. Writes peers.png and peers.svg."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"attar": "#d1495b", "attar-v3": "#e78a94", "llama": "#30638e", "llama-avx2": "#7ba3c4", "openvino": "#5a9367"}


def main():
    summary, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    best = [m for m in summary["medians"] if m["stands"]]
    panels = sorted({(m["test"], m["threads"]) for m in best})
    if not panels:
        print("nothing to plot")
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (test, threads) in zip(axes.flat, panels):
        rows = sorted((m for m in best if (m["test"], m["threads"]) == (test, threads)), key=lambda m: m["median"])
        names = [m["contestant"] for m in rows]
        medians = [m["median"] for m in rows]
        spread = [[m["median"] - m["min"] for m in rows], [m["max"] - m["median"] for m in rows]]
        colours = [COLOURS[n.split("/")[0]] for n in names]
        bars = axis.barh(names, medians, color=colours, xerr=spread, error_kw={"lw": 0.8, "alpha": 0.6})
        axis.bar_label(bars, [f"{v:.0f}" for v in medians], padding=4, fontsize=8)
        axis.set_title(f"{test}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        axis.set_xlim(0, 1.15 * max(m["max"] for m in rows))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{summary['model']}: tokens/s, {summary['machine']['cpu']}; bars: median, whiskers: min and max", fontsize=11)
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"peers.{suffix}", dpi=130)
    print(f"plots: {out / 'peers.png'}, {out / 'peers.svg'}")


if __name__ == "__main__":
    main()
