"""The programs of examples/, at small sizes. Those that need Ray, Jupyter or a server are run by
`make test-examples`, which installs what they need."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
import torch

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

pytest.importorskip("PIL")

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = EXAMPLES / "triton_server" / "models"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the examples, as Python does for a script there."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Beside other programs its workers would starve, and many at once its start times out.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)  # of Ray's workers
    monkeypatch.syspath_prepend(str(EXAMPLES / "triton_server"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def free_port() -> int:
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def some_pictures(example: Any, folder: Path, count: int) -> list[Path]:
    """Pictures, and after them an empty file, a text and half a picture."""
    paths = example("pictures").draw_pictures(folder, count)
    damaged = [folder / name for name in ("empty.png", "text.jpg", "torn.jpg")]
    data = paths[1].read_bytes()
    for path, content in zip(damaged, (b"", b"no picture", data[: len(data) // 2]), strict=True):
        path.write_bytes(content)
    return [*paths, *damaged]


def scores_of(example: Any, paths: list[Path]) -> torch.Tensor:
    """The probabilities by the plain model, one picture after another."""
    pictures = example("pictures")
    model = pictures.load_network(None)
    mean, std = (torch.tensor(v)[:, None, None] for v in (pictures.MEAN, pictures.STD))
    scores = []
    for path in paths:
        pixels = torch.from_numpy(pictures.decode(path.read_bytes()))
        with torch.no_grad():
            scores.append(model(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None])[0])
    return torch.stack(scores)


def test_detector(example: Any) -> None:
    """The fused detector learns, and the plain one with it."""
    found = example("detector").main(["--steps", "12", "--size", "64"])
    assert found["last_loss"] < 0.9 * found["first_loss"]
    assert found["error"] < 1e-4


def test_dataloader(example: Any, tmp_path: Path) -> None:
    """The last batch has fewer pictures; workers are processes."""
    example("pictures").draw_pictures(tmp_path, 7)
    found = example("dataloader").main(["--folder", str(tmp_path), "--batch", "4"])
    assert found["pictures"] == 7
    assert found["error"] < 1e-5


@pytest.mark.parametrize("data", [b"", b"no picture", "torn", "huge"])
def test_damaged_pictures(example: Any, tmp_path: Path, data: Any) -> None:
    pictures = example("pictures")
    if data == "torn":
        data = pictures.draw_pictures(tmp_path, 2)[1].read_bytes()[:900]
    elif data == "huge":  # some kilobytes that would be a gigabyte of pixels
        path = tmp_path / "huge.png"
        pictures.Image.new("1", (10_000, 8_000)).save(path)
        data = path.read_bytes()
    with pytest.raises(
        pictures.DamagedPictureError, match=r"not an image|truncated|too many|cannot"
    ):
        pictures.decode(data)


# Triton Inference Server ----------------------------------------------------------------------


class _StandInTensor:
    def __init__(self, name: str, data: np.ndarray) -> None:
        self.name, self.data = name, data

    def as_numpy(self) -> np.ndarray:
        return self.data


def test_triton_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Requests of several pictures become one batch, and each gets its own scores back."""
    utilities: Any = types.ModuleType("triton_python_backend_utils")
    utilities.Tensor = _StandInTensor
    utilities.InferenceResponse = list
    utilities.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    monkeypatch.syspath_prepend(str(MODELS / "shufflenet" / "1"))
    network = snv2.models.shufflenet_v2_x0_5(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    config = {
        "max_batch_size": 4,
        "input": [{"dims": ["64", "64", "3"]}],
        "parameters": {
            "weights": {"string_value": "weights.pth"},
            "threads": {"string_value": "1"},
        },
    }
    model = importlib.import_module("model").TritonPythonModel()
    monkeypatch.delitem(sys.modules, "model")
    threads = torch.get_num_threads()
    try:
        model.initialize({
            "model_config": json.dumps(config), "model_repository": str(tmp_path),
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
        })  # fmt: skip
        images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
        for cuts in ([1], [2], [1, 3], []):  # where requests begin
            parts = [part for part in np.split(images, cuts) if len(part)]
            requests = [{"pixels": _StandInTensor("pixels", part)} for part in parts]
            answers = [response[0] for response in model.execute(requests)]
            assert [answer.name for answer in answers] == ["scores"] * len(parts)
            assert [answer.data.shape for answer in answers] == [(len(p), 10) for p in parts]
            together = model.engine(torch.from_numpy(images)).numpy()
            assert np.array_equal(np.concatenate([a.data for a in answers]), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.examples
def test_triton_server(example: Any, tmp_path: Path) -> None:
    """The server of nvidia-pytriton answers as an engine does, several requests at once."""
    installed = os.environ.get("SNV2_TRITON_SERVER")
    if installed is None:
        pytest.skip("SNV2_TRITON_SERVER names no folder of nvidia-pytriton")
    server, client, pictures = map(example, ("local_server", "client", "pictures"))
    shape = 3, pictures.SIZE, pictures.SIZE, 3
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    options = {"normalize": (pictures.MEAN, pictures.STD)}
    engine = snv2.Engine(pictures.load_network(None), (3, 3, *shape[1:3]), **options)
    expected = engine(torch.from_numpy(images)).numpy()
    with (
        server.running_server(Path(installed), MODELS, free_port()) as address,
        ThreadPoolExecutor(4) as pool,
    ):
        counts = [1 + i % 3 for i in range(12)]
        for count, scores in zip(
            counts, pool.map(lambda n: client.infer(address, images[:n]), counts), strict=True
        ):
            assert max_error(*map(torch.from_numpy, (scores, expected[:count]))) < 1e-6
        with pytest.raises(OSError, match="400"):
            client.infer(address, images[:, :100])


# Ray ------------------------------------------------------------------------------------------


@pytest.mark.examples
def test_ray_data(example: Any, tmp_path: Path) -> None:
    """Each file has its row, whichever of the two workers had it; damaged ones have a text."""
    pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = some_pictures(example, tmp_path / "pictures", 13)
    program = [sys.executable, str(EXAMPLES / "ray_data.py")]
    folders = [str(tmp_path / "pictures"), str(tmp_path / "results")]
    subprocess.run([*program, *folders, "--batch", "4"], check=True, timeout=300)
    table = parquet.read_table(tmp_path / "results").to_pylist()
    rows = {Path(row["path"]).name: row for row in table}
    assert len(rows) == len(table) == len(paths)
    expected = scores_of(example, paths[:-3]).softmax(1).max(1)
    for path, score, found in zip(paths, *map(torch.Tensor.tolist, expected), strict=False):
        row = rows[path.name]
        assert (row["class"], row["error"]) == (found, "")
        assert row["score"] == pytest.approx(score, rel=1e-4)
    for path in paths[-3:]:
        assert rows[path.name]["class"] == -1
        assert rows[path.name]["error"]


@pytest.fixture
def ray_serve(example: Any) -> Iterator[tuple[Any, int]]:
    pytest.importorskip("ray")
    module, port = example("ray_serve"), free_port()
    try:
        module.start(port, None, 1, 1, plain=True)
        yield module, port
    finally:
        module.stop()


@pytest.mark.examples
def test_ray_serve(example: Any, ray_serve: tuple[Any, int], tmp_path: Path) -> None:
    """Good pictures among bad ones are answered as by the plain model, and nothing dies."""
    module, port = ray_serve
    paths = some_pictures(example, tmp_path, 6)
    expected = scores_of(example, paths[:-3]).softmax(1).max(1)

    def ask(path: Path, route: str = "/classify") -> tuple[int, Any]:
        connection = http.client.HTTPConnection(module.HOST, port, timeout=60)
        try:
            return module.post(connection, route, path.read_bytes())
        finally:
            connection.close()

    too_large = tmp_path / "large.jpg"
    too_large.write_bytes(bytes(module.MOST_BYTES + 1))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # the second time after bad ones
            answers = list(pool.map(ask, [*paths, too_large]))
            assert [status for status, _ in answers] == 6 * [200] + 3 * [400] + [413]
            assert all(answer["error"] for _, answer in answers[6:])
            for (_, answer), score, found in zip(answers, *expected, strict=False):
                assert answer["class"] == int(found)
                assert answer["score"] == pytest.approx(float(score), rel=1e-4)
    assert ask(paths[0], "/plain")[1]["class"] == int(expected.indices[0])
    bodies = [path.read_bytes() for path in paths[:6]]
    measured = module.measure(port, "/classify", bodies, count=24, connections=4, seconds=60)
    assert measured["requests"] == 24
    assert 0 < measured["p50_ms"] <= measured["p99_ms"]


# The notebook ---------------------------------------------------------------------------------


def test_notebook_has_no_outputs() -> None:
    notebook = json.loads((EXAMPLES / "first_ten_minutes.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.examples
def test_notebook(tmp_path: Path) -> None:
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "first_ten_minutes.ipynb", as_version=4)
    nbformat.validate(notebook)
    run = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=run).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "engine  " in printed
