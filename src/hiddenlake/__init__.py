"""hiddenlake: activations of language models, captured while they generate, stored in Zarr, probed.

    import hiddenlake

    hiddenlake.capture("path/to/model", "cities", limit=1000, out="lake/cities")
    data = hiddenlake.open_capture("lake/cities").dataset()
    grid = hiddenlake.fit_grid(hiddenlake.open_capture("lake/cities"), "mlp_out")

    lake = hiddenlake.connect("http://localhost:8765")  # `hiddenlake serve lake`; the same interface as connect("lake")
    data = lake.capture("cities").dataset()

Nothing heavy is imported before it is used: neither torch nor vLLM, nor xarray or zarr.
"""

from importlib import import_module
from typing import Any

from hiddenlake.cache.store.zarr_import import register_when_zarr_is_imported

__version__ = "0.1.0"

# zarr 3.1 lists data types of other packages and does not load them; from 3.2 on it finds ours by itself.
register_when_zarr_is_imported()

_WHERE = {
    "attach": "hiddenlake.cache.attach",
    "taps": "hiddenlake.cache.attach",
    "connect": "hiddenlake.cache.client.lake",
    "connect_async": "hiddenlake.cache.client.asynchronous",
    "open_capture": "hiddenlake.cache.store.reader",
    "export_capture": "hiddenlake.cache.exchange.exporting",
    "import_source": "hiddenlake.cache.exchange.importing",
    "VllmDumps": "hiddenlake.cache.exchange.vllm_dumps",
    "JsonlSource": "hiddenlake.cache.exchange.jsonl",
    "fit_probes": "hiddenlake.probing.fit",
    "fit_multiclass": "hiddenlake.probing.multiclass",
    "fit_grid": "hiddenlake.probing.grid",
    "fit_multiclass_grid": "hiddenlake.probing.multiclass_grid",
    "open_grid": "hiddenlake.probing.grid",
    "save_grid": "hiddenlake.probing.grid",
    "best_cell": "hiddenlake.probing.grid",
    "held_out": "hiddenlake.probing.held_out",
    "draw_heatmap": "hiddenlake.probing.plots",
    "write_report": "hiddenlake.probing.report.page",
    "Sampling": "hiddenlake.cache.identity",
    "load_task": "hiddenlake.probing.tasks.registry",
    "demo_model": "hiddenlake.cache.demo_model",
    "HiddenlakeError": "hiddenlake.cache.errors",
}

__all__ = ["capture", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hiddenlake' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def capture(model: str, task: Any, *, limit: int | None = None, **settings: Any) -> Any:
    """Capture a task's answers and activations. Returns a Summary; resumes where it stopped.

    model : Hugging Face folder, or hub id.
    task : a task's name, a JSONL or CSV file, or a Task.
    limit : only the first so many questions.
    settings : see `hiddenlake.cache.capture.capture`: out, sites, layers, positions, engine, dtype, ...
    """
    from hiddenlake.cache.capture import capture as run

    if isinstance(task, str):
        from hiddenlake.probing.tasks.registry import load_task

        task = load_task(task, limit)
    return run(model, task, **settings)
