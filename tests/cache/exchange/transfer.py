"""Exports or imports with an end in sight; run as a process that is to be interrupted.

python transfer.py export CAPTURE OUT FORMAT LIMIT    LIMIT: largest file that may be written, in bytes, or 0
python transfer.py import SOURCE OUT IDENTITY LIMIT   SOURCE: vLLM's dumps, with the layer ids 0 to 2

Once half is done it prints `half` and waits for what its parent does.
"""

import json
import resource
import sys
import time

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.exchange.cost import Watcher
from hiddenlake.cache.exchange.exporting import export_capture
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.vllm_dumps import VllmDumps


class Pause(Watcher):
    def progressed(self, done, total):
        if 2 * done > total and not limit:
            print("half", flush=True)
            time.sleep(60)


what, source, out, third, limit = sys.argv[1:]
limit = int(limit)
try:
    if limit:
        import datasets  # noqa: F401  its own files are written before the limit
        import torch  # noqa: F401

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if what == "export":
        export_capture(source, out, third, shard_bytes=100_000, memory_bytes=500_000, watcher=Pause())
    else:
        dumps = VllmDumps(source, [0, 1, 2], "bfloat16", prompts_only=True)
        import_source(dumps, out, json.loads(third), shard_samples=2, watcher=Pause())
except HiddenlakeError as error:
    print(type(error).__name__, error)
