"""What an engine on a GPU has decided for itself: said beside its numbers."""

from typing import Any

import torch


def facts(config: Any) -> dict[str, Any]:
    """{"kv_tokens": that fit its cache, "runner", "graphs", "scheduling"}. config : VllmConfig of a running engine."""
    cache, compilation = config.cache_config, config.compilation_config
    return {
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "graphs": compilation.cudagraph_mode.name,
        "scheduling": "asynchronous" if config.scheduler_config.async_scheduling else "synchronous",
    }


class Replays:
    """Counts the replays of CUDA graphs in this process; zero where the engine has one of its own."""

    def __init__(self) -> None:
        self.count = 0
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph: torch.cuda.CUDAGraph) -> None:
            self.count += 1
            replay(graph)

        torch.cuda.CUDAGraph.replay = counted
