"""Results as a picture. matplotlib is optional and imported here only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kiloq.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""A line's name -> its points, across and up."""
Series = Mapping[str, Mapping[str, float]]
"""A line or colour's name -> a group's label -> the value."""


def require_matplotlib() -> None:
    """A clear error before minutes are spent on measuring."""
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "--plot needs matplotlib, which is not installed: pip install 'kiloq[bench]', or leave --plot out."
        ) from error


def draw(path: Path, title: str, panels: Sequence[tuple[str, Series]]) -> None:
    """One PNG with a panel of bars for each (what the axis shows, its series)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(sum(len(values) for values in series.values()) for _, series in panels)
    width = max(4.0, 1.0 + 0.5 * most)  # inches: room for the figure above each bar
    figure = Figure(figsize=(width * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, series) in zip(axes, panels, strict=True):
        groups = list(dict.fromkeys(group for values in series.values() for group in values))
        bar_width = 0.8 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            places = [
                i + (number - (len(series) - 1) / 2) * bar_width for i, group in enumerate(groups) if group in values
            ]
            heights = [values[group] for group in groups if group in values]
            bars = axis.bar(places, heights, bar_width * 0.95, label=name)
            axis.bar_label(bars, [short(height) for height in heights], fontsize=7, padding=2)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_xlabel("tokens of prompt + answer", fontsize=8)
        axis.set_ylabel(label)
        axis.set_xlim(*((-1.5, 1.5) if len(groups) == 1 else (-0.6, len(groups) - 0.4)))  # no bar as wide as a wall
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_curves(path: Path, title: str, panels: Sequence[tuple[str, str, Curves]]) -> None:
    """One PNG with a panel of lines for each (what is across, what is up, its curves)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (across, up, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, (xs, ys) in curves.items():
            axis.plot(xs, ys, label=name)
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(path)


def short(value: float) -> str:
    """Three figures, thousands separated."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
