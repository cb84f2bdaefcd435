"""Scripts in processes of their own, where they may break what the engine is made of."""

from pathlib import Path
from subprocess import CompletedProcess

from .. import prepared


def run_script(said: Path, script: str, *arguments: object, **environment: str) -> CompletedProcess:
    """Run Python source to its end, in the folder of these tests. said : a folder for what it says."""
    process = prepared.start(said, *arguments, script=script, folder=Path(__file__).parent, environment=environment)
    return CompletedProcess("script", process.wait(600), process.out, process.err)
