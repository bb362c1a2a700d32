"""Plots of measured results, written as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_softheads.files import replacing

_LEAST = 0.01  # per cent, the least loss that is drawn
_MARKERS = "osD^vP*X"
_COLORS = [f"C{i}" for i in range(10)] + ["#222222", "#b8860b", "#006d5b", "#8b1a6b"]


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files: no screen is needed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib; run `pip install matplotlib`", name=error.name
        ) from error

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_stages(stages: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> Path:
    """Perplexity of each stage of a retrofit as bars, with the mapping's floor and the dense model as lines."""
    names = [stage["name"] for stage in stages]
    values = [stage["perplexity"] for stage in stages]
    figure, axes = pyplot().subplots(figsize=(7.2, 3.2), layout="constrained")
    colors = ["#4c566a", *["#5e81ac"] * (len(stages) - 1)]
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4)
    for row, stage in enumerate(stages):
        if stage.get("floor"):
            (line,) = axes.plot([stage["floor"]] * 2, [row - 0.4, row + 0.4], color="#bf616a", lw=2)
            line.set_label(
                "floor of the mapping" if not axes.get_legend_handles_labels()[1] else None
            )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, max(values) * 1.6)
    axes.set_xlabel("strict perplexity on held-out text (log scale, lower is better)")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower right", frameon=False)
    return _save(figure, path)


def plot_frontier(
    points: Sequence[Mapping[str, Any]], path: str | Path, *, x: str, xlabel: str, title: str
) -> Path:
    """Perplexity lost to the dense head against a size, one line a variant.

    Variants of the same first word share a color; those that are marked as `baseline` are dashed. A loss of less than
    0.01 % is drawn there.

    Args:
        points: dictionaries with `variant`, `ratio` of the perplexities, the size under the name `x` and perhaps
            `baseline`.
    """
    return plot_frontiers([(points, x, xlabel)], path, title)


def plot_frontiers(
    panels: Sequence[tuple[Sequence[Mapping[str, Any]], str, str]], path: str | Path, title: str
) -> Path:
    """`plot_frontier` for several sizes side by side: `(points, x, xlabel)` of each; a variant looks alike in all."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, columns = plt.subplots(
        1,
        len(panels),
        figsize=(4.6 * len(panels) + 2.4 + (len(panels) == 1) * 2, 4.6),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    every = [point for points, _, _ in panels for point in points]
    names = sorted({point["variant"] for point in every})
    baselines = {point["variant"] for point in every if point.get("baseline")}
    families = list(dict.fromkeys(map(_family, names)))
    style = {}
    for name in names:
        relatives = [other for other in names if _family(other) == _family(name)]
        color = _COLORS[families.index(_family(name)) % len(_COLORS)]
        marker = _MARKERS[relatives.index(name) % len(_MARKERS)]
        style[name] = {"color": color, "marker": marker, "ls": "--" if name in baselines else "-"}
    for axes, (points, x, xlabel) in zip(columns[0], panels, strict=True):
        for variant, look in style.items():
            own = sorted((p for p in points if p["variant"] == variant), key=lambda p: p[x])
            losses = [max(100 * (p["ratio"] - 1), _LEAST) for p in own]
            (line,) = axes.plot([p[x] for p in own], losses, ms=5, lw=1.2, **look)
            if axes is columns[0][0]:
                line.set_label(variant)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", lw=0.5, alpha=0.5)
        axes.set_xlabel(xlabel)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0][0].set_ylabel("perplexity above the dense head's (log scale)")
    columns[0][0].set_title(title, loc="left")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return _save(figure, path)


def _family(variant: str) -> str:
    return variant.replace(",", " ").split()[0]


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=150)
    pyplot().close(figure)
    return path


def plot_heads(maps: Mapping[str, Sequence[Sequence[float]]], path: str | Path, title: str) -> Path:
    """Heat maps side by side, each of one number per layer (down) and head (across)."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(
        1, len(maps), figsize=(3.4 * len(maps), 3.4), layout="constrained", squeeze=False
    )
    for axes, (name, values) in zip(panels[0], maps.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=panels[0].tolist(), shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left")
    return _save(figure, path)


def plot_layers(lines: Mapping[str, Sequence[float]], path: str | Path, title: str) -> Path:
    """Numbers by layer on a logarithmic axis; 0 is the embedding."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, values in lines.items():
        axes.plot(range(len(values)), values, marker="o", ms=4, label=name)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (0: embedding)")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_head(facts: Mapping[str, Any], path: str | Path) -> Path:
    """Spectra of logits and hidden states, and the loss by token frequency, of a `HeadDiagnostics` as a dictionary."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for name, rank in (("spectrum", "effective_rank"), ("state_spectrum", "state_effective_rank")):
        values = [max(value, 1e-8) for value in facts[name]]
        what = "logits" if name == "spectrum" else "hidden states"
        label = f"{what}, effective rank {facts[rank]:.0f}"
        left.plot(range(1, len(values) + 1), values, label=label)
    left.axvline(facts["dim"], color="#4c566a", lw=1, ls=":", label=f"D = {facts['dim']}")
    left.set_yscale("log")
    left.set_xlabel("singular value")
    left.set_ylabel("÷ the largest")
    left.set_title(f"{facts['name']}: rank of the logits", loc="left")
    left.legend(frameon=False, fontsize=8)
    bands = [band for band in facts["bands"] if band["tokens"]]
    places = range(len(bands))
    right.bar(places, [band["loss"] for band in bands], color="#5e81ac", label="this head")
    if any(band["dense_loss"] is not None for band in bands):
        dense = [band["dense_loss"] for band in bands]
        right.scatter(places, dense, color="#bf616a", marker="_", s=400, label="dense head")
        right.legend(frameon=False, fontsize=8)
    right.set_xticks(places, [f"≤ {band['last']:,}" for band in bands])
    right.set_xlabel("frequency rank of the token")
    right.set_ylabel("loss (nats)")
    right.set_title("loss by token frequency", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[float]], path: str | Path, *, xlabel: str, ylabel: str, title: str
) -> Path:
    """Curves over shares from 0 to 1, evenly spaced."""
    figure, axes = pyplot().subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, values in curves.items():
        axes.plot([(i + 1) / len(values) for i in range(len(values))], values, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_ratios(bars: Mapping[str, float], path: str | Path, xlabel: str, title: str) -> Path:
    """Horizontal bars, the longest on top, with a line at 1."""
    names = sorted(bars, key=lambda name: bars[name])
    figure, axes = pyplot().subplots(figsize=(7.2, 0.8 + 0.24 * len(bars)), layout="constrained")
    drawn = axes.barh(names, [bars[name] for name in names], color="#5e81ac")
    axes.bar_label(drawn, [f"{bars[name]:.2f}" for name in names], padding=4, fontsize=8)
    axes.axvline(1.0, color="#4c566a", lw=1)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)
