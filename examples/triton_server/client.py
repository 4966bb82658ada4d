"""Ask a Triton Inference Server for the likeliest class of pictures.

    python examples/triton_server/client.py PICTURE... --address http://127.0.0.1:8000

The body is Triton's binary form of the KServe protocol: a line of JSON, then the pixels as they lie
in memory. `pip install tritonclient` has the same and more.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from pictures import DamagedPictureError, decode


def infer(address: str, pixels: np.ndarray, model: str = "shufflenet") -> np.ndarray:
    """The scores [N, classes] of pictures, uint8 [N, 224, 224, 3]."""
    data = np.ascontiguousarray(pixels).tobytes()
    header = json.dumps({
        "inputs": [{
            "name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape),
            "parameters": {"binary_data_size": len(data)},
        }],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v2/models/{model}/infer",
        header + data,
        {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        },
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        length = int(response.headers["Inference-Header-Content-Length"])
        body = response.read()
    shape = json.loads(body[:length])["outputs"][0]["shape"]
    return np.frombuffer(body[length:], np.float32).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a Triton server for classes of pictures.")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    for path in options.pictures:
        try:
            pixels = decode(path.read_bytes())
        except DamagedPictureError as error:
            print(f"{path}: {error}", file=sys.stderr)
            continue
        scores = infer(options.address, pixels[None])[0]
        print(f"{path}: class {scores.argmax()}, score {scores.max():.3f}")


if __name__ == "__main__":
    main()
