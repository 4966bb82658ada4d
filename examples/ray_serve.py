"""Serve a network over HTTP with Ray Serve, in batches; and measure it.

    RAY_USAGE_STATS_ENABLED=0 python examples/ray_serve.py            # http://127.0.0.1:8000/classify
    curl --data-binary @photo.jpg http://127.0.0.1:8000/classify      # {"class": 17, "score": 0.93}
    RAY_USAGE_STATS_ENABLED=0 python examples/ray_serve.py --measure 200

What it shows:

- The body of a request is the bytes of a picture. They are decoded in threads beside the network,
  and `serve.batch` gathers what comes within some milliseconds. The engine takes as many as came.
- A replica is a process with one engine. `--replicas` times `--threads` should be the cores.
- A damaged picture is answered with 400 and a text, a body that is too large with 413; the other
  pictures of the batch are answered as if these had not been there.
- `--measure` sends so many requests, over some connections at once, to 127.0.0.1 and nowhere else.
  As many go one by one to the eager model without batches, at /plain.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch
from pictures import MEAN, SIZE, STD, DamagedPictureError, decode, draw_pictures, load_network
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import snv2_kernels as snv2

MOST_BYTES = 4 << 20  # of a body
MOST_PICTURES = 8  # of a batch
# Serve's own limits: requests that a replica works on, and that wait for one. It refuses more.
LIMITS = {"max_ongoing_requests": 4 * MOST_PICTURES, "max_queued_requests": 8 * MOST_PICTURES}

HOST = "127.0.0.1"


class Classifier:
    """Answers a picture with its likeliest class. Subclasses say how scores are computed."""

    async def scores(self, pixels: np.ndarray) -> torch.Tensor:
        """The scores [classes] of one picture, uint8 [H, W, C]."""
        raise NotImplementedError

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            body = await read_body(request)
            pixels = await asyncio.to_thread(decode, body)
        except BodyTooLargeError:
            return JSONResponse({"error": f"expected at most {MOST_BYTES} bytes"}, 413)
        except DamagedPictureError as error:
            return JSONResponse({"error": f"not a readable picture: {error}"}, 400)
        score, found = (await self.scores(pixels)).softmax(0).max(0)
        return JSONResponse({"class": int(found), "score": float(score)})


class BodyTooLargeError(ValueError):
    """More bytes than a request may have."""


async def read_body(request: Request) -> bytes:
    """The bytes of a request, of which no more are read than one may have.

    Raises:
        BodyTooLargeError: if there are more.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise BodyTooLargeError
    return bytes(body)


@serve.deployment(**LIMITS)
class Batched(Classifier):
    """The engine, for as many pictures as wait."""

    def __init__(self, weights: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        shape = MOST_PICTURES, 3, SIZE, SIZE
        self.engine = snv2.Engine(load_network(weights), shape, normalize=(MEAN, STD))

    def _scores(self, batch: torch.Tensor) -> torch.Tensor:
        # A copy, since the next call overwrites the engine's buffer.
        return self.engine(batch).clone()

    @serve.batch(max_batch_size=MOST_PICTURES, batch_wait_timeout_s=0.002)
    async def scores(self, pixels: list[np.ndarray]) -> list[torch.Tensor]:
        batch = self.engine.input[: len(pixels)]
        torch.stack([torch.from_numpy(picture) for picture in pixels], out=batch)
        # In a thread, so that requests are read meanwhile; of batches one runs at a time.
        return list(await asyncio.to_thread(self._scores, batch))


@serve.deployment(**LIMITS)
class Plain(Classifier):
    """The eager model, for one picture at a time: what the other is measured against."""

    def __init__(self, weights: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = load_network(weights)

    async def scores(self, pixels: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.inference_mode():
            return self.model(x)[0]


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON of one request."""
    connection.request("POST", path, body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def measure(
    port: int, path: str, bodies: list[bytes], count: int, connections: int, seconds: float = 60
) -> dict[str, float]:
    """Send requests over several connections at once, a bounded number in a bounded time."""
    end = time.monotonic() + seconds

    def one_connection(number: int) -> list[float]:
        connection = http.client.HTTPConnection(HOST, port, timeout=seconds)
        times = []
        for i in range(number, count, connections):
            if time.monotonic() > end:
                break
            start = time.perf_counter()
            status, answer = post(connection, path, bodies[i % len(bodies)])
            times.append(time.perf_counter() - start)
            if status != 200:
                raise RuntimeError(f"status {status}: {answer}")
        connection.close()
        return times

    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        times = np.concatenate(list(pool.map(one_connection, range(connections))))
    elapsed = time.perf_counter() - start
    p50, p99 = np.percentile(times, (50, 99)) * 1e3
    return {
        "requests": len(times), "p50_ms": float(p50), "p99_ms": float(p99),
        "pictures_per_s": len(times) / elapsed,
    }  # fmt: skip


def start(port: int, weights: str | None, replicas: int, threads: int, *, plain: bool) -> None:
    """Serve /classify, and /plain if it is asked for, on 127.0.0.1."""
    ray.init(
        num_cpus=(replicas + plain) * threads + 1,
        object_store_memory=128 << 20,
        include_dashboard=False,
    )
    serve.start(http_options={"host": HOST, "port": port})
    options = {"ray_actor_options": {"num_cpus": threads}, "num_replicas": replicas}
    batched = Batched.options(**options).bind(weights, threads)
    serve.run(batched, name="batched", route_prefix="/classify")
    if plain:
        one = Plain.options(**options | {"num_replicas": 1}).bind(weights, threads)
        serve.run(one, name="plain", route_prefix="/plain")


def stop() -> None:
    serve.shutdown()
    ray.shutdown()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a network over HTTP with Ray Serve.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--weights", help="that snv2.models.load takes; by default random")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--measure", type=int, metavar="REQUESTS", help="and end")
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args(arguments)
    measured = options.measure is not None
    try:
        start(options.port, options.weights, options.replicas, options.threads, plain=measured)
        if not measured:
            print(f"http://{HOST}:{options.port}/classify, until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            return
        with TemporaryDirectory() as folder:
            bodies = [path.read_bytes() for path in draw_pictures(Path(folder), 16)]
        for path, connections in (
            ("/plain", 1),
            ("/classify", 1),
            ("/classify", options.connections),
        ):
            measure(options.port, path, bodies, 8, connections)  # to warm up
            found = measure(options.port, path, bodies, options.measure, connections)
            print(f"{path}, {connections} at once: {json.dumps(found)}")
    finally:
        stop()


if __name__ == "__main__":
    main()
