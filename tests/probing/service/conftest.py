"""A lake of a small capture with grids and a probe, made by the fits themselves, and its server: by a real process over a
socket, and in this process."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.saving import save_grid
from hiddenlake.probing.train import fit_probe

IDENTITY = {"model": "synthetic/model", "task": "synthetic", "weights": "abc"}
CELL = {"layer": 1, "position": "exact_answer_last"}
# A sample's group, and part of its prompt.
HOSTILE = "<img src=x onerror=alert(1)>"
START_SECONDS = 60


@pytest.fixture(scope="session")
def written_lake(tmp_path_factory, make_capture, store_capture) -> Path:
    """FOLDER/lake with the captures `cities`, `theirs` (of the tenant `them`) and `other` (another model's), and beside it
    FOLDER/grids and FOLDER/probes. Not to be changed: see `lake`."""
    folder = tmp_path_factory.mktemp("page")
    data = consistent(make_capture(n=160, n_layers=3, hidden=8))
    data.group[3] = HOSTILE
    identities = {"cities": {}, "theirs": {"tenant": "them"}, "other": {"weights": "def"}}
    for name, differs in identities.items():
        store_capture(data, folder / "lake" / name, IDENTITY | differs)
    cities = folder / "lake" / "cities"
    one = fit_grid(cities, "mlp_out", C=[0.01, 0.1], shuffles=2)
    save_grid(one, folder / "grids" / "one.zarr")
    save_grid(
        fit_grid(cities, "mlp_out", groups="gold", layers=[0, 1], shuffles=2, controls=()),
        folder / "grids" / "two.zarr",
    )
    save_grid(fit_grid(cities, "mlp_out", compat="llmsknow", controls=()), folder / "grids" / "paper.zarr")
    theirs = fit_grid(folder / "lake" / "theirs", "mlp_out", layers=[1], shuffles=0, controls=())
    save_grid(theirs, folder / "grids" / "secret.zarr")
    fit_probe(cities, "mlp_out", **CELL).save(folder / "probes" / "best.safetensors")
    fit_probe(folder / "lake" / "theirs", "mlp_out", **CELL).save(folder / "probes" / "secret.safetensors")
    return folder


def consistent(data: xr.Dataset) -> xr.Dataset:
    """As a model gives it: positions that are the same token have the same activations, here those of CELL's position."""
    index, values = data.token_index.values, data.mlp_out.values.copy()
    order = [data.position.values.tolist().index(CELL["position"]), *range(len(index))]
    for sample in range(index.shape[1]):
        first: dict[int, int] = {}
        for position in order:
            values[:, position, sample] = values[:, first.setdefault(index[position, sample], position), sample]
    return data.assign(mlp_out=(data.mlp_out.dims, values))


@pytest.fixture
def lake(written_lake, tmp_path) -> Path:
    """A copy of one's own: the lake's folder."""
    shutil.copytree(written_lake, tmp_path / "copy")
    return tmp_path / "copy" / "lake"


class Server:
    """`hiddenlake serve` in a process of its own, with the key of its run."""

    def __init__(self, lake: Path, log: Path, *options: str) -> None:
        begun = time.monotonic()
        self.lake, self._log = lake, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hiddenlake.cli", "serve", str(lake), "--port", "0", *options],
                stdout=file,
                stderr=file,
            )
        while '"listening"' not in self.log:
            assert self.process.poll() is None and time.monotonic() - begun < START_SECONDS, self.log
            time.sleep(0.01)
        self.url = re.search(r"http://\S+", self.log)[0]
        self.key = re.search(r"hl_[\w-]+", self.log)[0]

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in found for pid in file.read_text().split()]

    def libraries(self) -> str:
        """Files that the process has loaded."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(lake: Path, *options: str) -> Server:
        running.append(Server(lake, tmp_path / f"log-{len(running)}", *options))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@contextmanager
def client_of(lake: Path, tenant: str | None = None, scope: str | None = "read", **settings: Any) -> Iterator[Any]:
    """A client of the app in this process."""
    from starlette.testclient import TestClient

    from hiddenlake.cache.service.app import make_app
    from hiddenlake.cache.service.serving import make_parts
    from hiddenlake.cache.service.settings import load_settings
    from hiddenlake.probing.service.routers import make_routers

    parts = make_parts(lake, load_settings(settings)[0])
    headers = {"Authorization": f"Bearer {parts.keys.add('tests', scope, tenant)}"} if scope else {}
    app = make_app(parts, make_routers(lake))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False, headers=headers) as client:
        yield client


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that has ended and waits for its parent's look is not alive.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
