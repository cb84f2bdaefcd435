"""Makes the fixture capture of this format version; run once a version, and keep what it makes for ever.

python make_fixture.py FOLDER

Every bit is a function of the sample's number (process.py), so that any later version can tell whether it reads them right.
"""

import sys
from pathlib import Path

import process as tiny
import pyarrow as pa

from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.samples import Failure
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.labels import add_label

SAMPLES = 7
CAPTURES = {
    "plain": {},
    "float16-zstd": {"dtype": "float16", "codec": "zstd"},
    "float32-fp8": {"dtype": "float32", "codec": "fp8"},
}


def make(folder: Path) -> None:
    for name, settings in CAPTURES.items():
        settings = dict(settings)
        coverage = tiny.coverage(
            settings.pop("dtype", "bfloat16"), sites=("mlp_out", "final_norm"), tokens=Tokens("all")
        )
        tiny.write(folder / name, SAMPLES, coverage=coverage, shard_samples=4, **settings)
        with tiny.open_tiny(folder / name, SAMPLES, coverage=coverage) as writer:
            writer.fail(Failure("key-0007", 3, "the cause", 2))
        capture = open_capture(folder / name)
        add_label(capture, "score", pa.table({"key": capture.keys[:3], "v": [0.0, 0.5, 1.0]}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
