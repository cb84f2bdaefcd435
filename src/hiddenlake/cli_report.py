"""The command `hiddenlake report`: what probes found in a capture, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import Capture, talk

app = typer.Typer()


@app.command("report")
def report_command(
    capture: Capture,
    grid: Annotated[
        list[Path] | None,
        typer.Option(help="A grid, as `probe` wrote it; may be repeated. Without one they are fitted."),
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="Sites whose grids are fitted, by comma; default all that have layers.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The .html file; default NAME.html here.")] = None,
) -> None:
    """Make one HTML page that needs no network: heatmaps, controls, calibration, examples, and how it was made.

    Without --grid the grids are fitted first, with the settings that `probe` has by default, which takes minutes.
    """
    from hiddenlake.cache.progress import counted, size
    from hiddenlake.cache.sites import SITES
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.grid import fit_grid
    from hiddenlake.probing.report.page import check_ready, write_report

    if grid and sites is not None:
        raise BadInputError("--sites names what is fitted, and --grid what was: give one of them")
    opened = open_capture(capture)
    out = check_ready(out or Path(f"{opened.place.name}.html"))
    grids = list(grid or [])
    if not grids:
        c = opened.coverage
        chosen = sites.split(",") if sites else [site for site in c.sites if SITES[site].layered]
        cells = (len(c.layers) + 1) * len(c.positions)
        talk(
            f"no --grid is given: fitting {', '.join(chosen)}, {cells} cells each, of which {len(c.positions)} are the tokens' "
            f"embeddings, on {len(opened)} samples; the capture has {size(opened.nbytes)}"
        )
        for site in chosen:
            with counted(f"probing {site}") as progress:
                grids.append(fit_grid(opened, site, progress=progress))
    print(write_report(opened, grids, out))
