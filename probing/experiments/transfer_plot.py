"""The picture of a transfer: training tasks down, test tasks across, the AUC and what it is above the baseline."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hiddenlake.probing.experiments.table import Table

_DPI = 200


def draw_transfer(table: Table, path: Path) -> Path:
    """Draw the rows of `transfer`. path : .png, .svg or .pdf. Returns it."""
    tasks = table.facts["tasks"]
    at = {name: number for number, name in enumerate(tasks)}
    auc, above = np.full((2, len(tasks), len(tasks)), np.nan)
    for row in table.rows:
        where = at[row["train"]], at[row["test"]]
        auc[where], above[where] = row["AUC"], row["above baseline"]
    side = 1.6 + 0.62 * len(tasks)
    figure = Figure(figsize=(2.6 * side, side), facecolor="white")
    FigureCanvasAgg(figure)
    reach = max(0.1, float(np.nanmax(np.abs(above), initial=0.0)))
    panels = [
        (auc, "AUC", {"cmap": "Blues", "vmin": 0.5, "vmax": 1.0}, "{:.2f}"),
        (above, f"AUC above {table.facts['baseline']}", {"cmap": "RdBu", "vmin": -reach, "vmax": reach}, "{:+.2f}"),
    ]
    figure.subplots_adjust(wspace=0.7)
    for axes, (values, title, colours, form) in zip(figure.subplots(1, 2), panels, strict=True):
        image = axes.imshow(values, **colours)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axes.set_xlabel("tested on", fontsize=9)
        axes.set_ylabel("trained on", fontsize=9)
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color="w" if dark else "k")
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).ax.tick_params(labelsize=7)
    cell = "the test task's best cell (optimistic)" if table.facts["choose"] == "target" else "the training task's cell"
    turned = "; AUCs below one half are turned" if table.facts["compat"] != "none" else ""
    figure.suptitle(f"{table.facts['model']} \u00b7 {table.facts['site']} \u00b7 {cell}{turned}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    return path
