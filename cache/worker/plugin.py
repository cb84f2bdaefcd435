"""Installs the taps in every vLLM process that loads a model for a capture. Inert in all others.

vLLM calls `register` through the `vllm.general_plugins` entry point before it builds a worker.
"""

from typing import Any

CONFIG_KEY = "hiddenlake"


def register() -> None:
    """Wrap the worker's load_model once: taps must be in the model before it is compiled or graph-captured.

    The worker also gets one verb, for an engine that runs eagerly and was started without taps.
    """
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, "_hiddenlake_registered", False):
        return
    Worker._hiddenlake_registered = True
    load_model = Worker.load_model

    def load_model_with_taps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        additional = self.vllm_config.additional_config
        if isinstance(additional, dict) and CONFIG_KEY in additional:
            from hiddenlake.cache.worker.install import install_recorder

            install_recorder(self, additional[CONFIG_KEY])
        return result

    def hiddenlake_tap(self: Any, plan: dict[str, Any]) -> None:
        from hiddenlake.cache.worker.extension import CaptureExtension
        from hiddenlake.cache.worker.install import install_recorder

        install_recorder(self, plan)
        if not isinstance(self, CaptureExtension):  # vLLM leaves an extension in the class, for later workers too
            self.__class__ = type(type(self).__name__, (CaptureExtension, type(self)), {})

    Worker.load_model = load_model_with_taps
    Worker.hiddenlake_tap = hiddenlake_tap
