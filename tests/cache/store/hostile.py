"""Uses captures that lie in every way a user would, in a process of its own with little memory.

python hostile.py OUTSIDE < paths   prints one JSON line a capture: what each use said, seconds, bytes, files outside
"""

import json
import os
import resource
import signal
import sys
import time

from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.catalog import describe, list_captures
from hiddenlake.cache.store.root import read_root
from hiddenlake.cache.store.verify import verify
from hiddenlake.cache.store.writer import open_writer

# Beyond what is in use once everything is imported.
MEMORY = 1 << 30

SECONDS = 10


def read_all(path):
    capture = open_capture(path)
    for site in (*capture.coverage.sites, "embed"):
        if capture.coverage.positions:
            capture.read(site)
            for row in range(len(capture)):
                capture.read(site, samples=[row])
        if capture.coverage.tokens:
            capture.read_tokens(site)


def view(path):
    capture = open_capture(path)
    for tokens in (False, True):
        if capture.coverage.tokens or not tokens:
            capture.dataset(tokens=tokens).load()


def check(path):
    report = verify(path)
    if not report.ok:
        raise RuntimeError("; ".join(str(problem) for problem in report.problems))


def write(path):
    root = read_root(open_backend(path))
    with open_writer(
        path, identity=root.identity, coverage=root.coverage, provenance={}, planned=1, buffer_bytes=1 << 22
    ) as writer:
        writer.reserve(["new"], 1)
        shard, slot = writer.slot()
        writer.release(shard, slot)


USES = {
    "list": lambda path: json.dumps(list_captures(os.path.dirname(path))),
    "info": lambda path: describe(open_capture(path)),
    "read": read_all,
    "samples": lambda path: open_capture(path).samples(),
    "failures": lambda path: open_capture(path).failures(),
    "labels": lambda path: open_capture(path).labels(),
    "view": view,
    "verify": check,
    "write": write,
}


def timed_out(*_):
    raise TimeoutError


def main(outside):
    touched = []

    def audit(event, arguments):
        if event in ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.link") and arguments:
            for argument in arguments[:2]:
                if isinstance(argument, (str, bytes, os.PathLike)):
                    folder, name = os.path.split(os.path.abspath(os.fsdecode(argument)))
                    real = f"{os.path.realpath(folder)}/{name}"
                    if event == "open" and not (arguments[2] or 0) & os.O_NOFOLLOW:  # what else follows a last link
                        real = os.path.realpath(real)
                    if real.startswith(outside):
                        touched.append(real)

    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, timed_out)
    for number, line in enumerate(sys.stdin):
        path, said = line.strip(), {}
        touched.clear()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        for name, use in USES.items():
            signal.alarm(SECONDS)
            try:
                use(path)
                said[name] = None
            except BaseException as error:
                said[name] = [[kind.__name__ for kind in type(error).__mro__], str(error)]
            signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps([said, time.monotonic() - start, grown, touched[:]]), flush=True)
        if not number:
            # The first one is intact: by now all is imported, and threads have their stacks.
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    main(sys.argv[1])
