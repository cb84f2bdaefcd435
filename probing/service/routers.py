"""Routers: what this room adds to the service."""

from pathlib import Path

from fastapi import APIRouter

from hiddenlake.cache.service.app import with_examples
from hiddenlake.probing.service import page_routes
from hiddenlake.probing.service.findings import Findings
from hiddenlake.probing.service.probe_routes import probe_routes
from hiddenlake.probing.service.refit import Refits
from hiddenlake.probing.service.routes import grid_routes


def make_routers(lake: str | Path) -> list[APIRouter]:
    """The routes of grids, of probes, and of the page, over a lake's folder."""
    findings = Findings(lake)
    routers = [grid_routes(Path(lake), findings, Refits()), probe_routes(findings)]
    return [
        *(with_examples(router, Path(__file__).with_name("examples.json")) for router in routers),
        page_routes.router,
    ]
