"""An arm that burns CPU in this process or in a child of its own, or fails: what its round asks for."""

import subprocess
import sys
import time

from serve import serve

CHILD = "import time\nwhile time.process_time() < {}: pass\ntime.sleep(60)"


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Burning:
    def __init__(self, spec):
        print("a library that talks")
        if spec["fails"]:
            raise ValueError("no such model")

    def prepare(self, round):
        burn(0.2)  # not measured
        return round

    def run(self, round):
        if round["where"] == "here":
            burn(round["seconds"])
        elif round["where"] == "child":
            self.child = subprocess.Popen([sys.executable, "-c", CHILD.format(round["seconds"])])
            time.sleep(round["seconds"] + 1)
        else:
            raise RuntimeError("found 3, expected 4")

    def report(self, round, result):
        return {"pid": self.child.pid if round["where"] == "child" else 0}


if __name__ == "__main__":
    serve(Burning)
