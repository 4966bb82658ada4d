"""Run Triton Inference Server on this machine, without Docker.

    pip install --target SERVER --no-deps nvidia-pytriton==0.7.0 "numpy<2"
    python examples/triton_server/local_server.py SERVER --port 8000    # until Ctrl-C

PyPI's nvidia-pytriton carries the server's binary and its Python backend, for Linux on x86-64. Its
Python backend was built for numpy 1: with numpy 2 it takes all results for empty, so models get the
numpy in SERVER. On a machine with NVIDIA's container, and this package in it, all that it takes is
`tritonserver --model-repository examples/triton_server/models`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

MODELS = Path(__file__).parent / "models"


# The stub embeds a Python that heeds no PYTHONPATH.
_WITH_OUR_PACKAGES = """\
import runpy
import site
import sys

sys.path.insert(0, {server!r})
for path in {paths!r}:
    site.addsitedir(path)
TritonPythonModel = runpy.run_path({model!r})["TritonPythonModel"]
"""


def _our_paths() -> list[str]:
    """Where this Python finds packages, but its own library."""
    own = Path(sys.base_prefix).resolve()
    paths = [Path(path).resolve() for path in sys.path]
    return [str(path) for path in paths if path.is_dir() and own not in path.parents]


def _stub(server: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return server / "python_backend_stubs" / version / "triton_python_backend_stub"


@contextlib.contextmanager
def running_server(installed: Path, models: Path, port: int, seconds: float = 120) -> Iterator[str]:
    """Start a server on 127.0.0.1, wait until its models are ready, and stop it at the end.

    Args:
        installed: the folder that nvidia-pytriton was installed to.
        models: a model repository.
        port: of HTTP.
        seconds: to wait.

    Raises:
        RuntimeError: if there is no server to run, or it does not get ready.
    """
    server = installed / "pytriton" / "tritonserver"
    if not _stub(server).is_file():
        raise RuntimeError(f"{installed}: it has no nvidia-pytriton for this Python")
    with tempfile.TemporaryDirectory() as folder:
        # The process that runs a model, the stub, lies beside the backend.
        backends, copied = Path(folder) / "backends", Path(folder) / "models"
        shutil.copytree(server / "backends", backends)
        shutil.copy(_stub(server), backends / "python")
        shutil.copytree(models, copied)
        packages = {"server": str(installed.resolve()), "paths": _our_paths()}
        for path in copied.glob("*/*/model.py"):
            original = models.resolve() / path.relative_to(copied)
            path.write_text(_WITH_OUR_PACKAGES.format(**packages, model=str(original)))
        libraries = [Path(sys.base_prefix) / "lib", installed / "nvidia_pytriton.libs"]
        before = os.environ.get("LD_LIBRARY_PATH", "")
        environment = os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join([*map(str, libraries), before]),
            "PYTHONHOME": sys.base_prefix,
        }
        command = [
            str(server / "bin" / "tritonserver"), f"--model-repository={copied}",
            f"--backend-directory={backends}", f"--http-port={port}", "--http-address=127.0.0.1",
            "--allow-grpc=false", "--allow-metrics=false", "--log-info=false",
        ]  # fmt: skip
        process = subprocess.Popen(command, env=environment)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(process, address, seconds)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, seconds: float) -> None:
    end = monotonic() + seconds
    while monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/v2/health/ready"):
            return
        sleep(0.2)
    raise RuntimeError(f"the server is not ready after {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run Triton Inference Server from PyPI's package.")
    parser.add_argument("server", type=Path, help="the folder of nvidia-pytriton")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = running_server(options.server, MODELS, options.port)
    with contextlib.suppress(KeyboardInterrupt), server as address:
        print(f"ready at {address}", flush=True)
        while True:
            sleep(3600)


if __name__ == "__main__":
    main()
