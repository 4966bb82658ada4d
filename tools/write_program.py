"""Writes x1.0, a photograph and what PyTorch makes of it into a folder, for tests of C++ on this
and other machines: net.snv2, photo.ppm, scores.bin (float32) and classes.txt (the likeliest three,
a line each, as examples/cpp shows them); in bfloat16 image.bin, and as float64 exact.bin: scores
and, behind them, how far from them others may be."""

import copy
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_

SIZE = 224
# Units in the last place that a network in bfloat16 may err by, as in the tests of Python.
NARROW_BOUND = 10.6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    photo = torch.from_numpy(load_sample_image("china.jpg").copy())
    top, left = ((extent - SIZE) // 2 for extent in photo.shape[:2])
    image = photo[top : top + SIZE, left : left + SIZE].contiguous()
    x = ((image / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    model = randomize_(snv2.models.shufflenet_v2_x1_0()).eval()
    with torch.no_grad():
        model.fc.weight *= 4 / model(x).std()  # so that some classes stand out, and none alone
        scores = model(x)[0]
        narrow_x = x.bfloat16()
        exact = copy.deepcopy(model).double()(narrow_x.double())[0]
        eager_error = max_error(copy.deepcopy(model).bfloat16()(narrow_x)[0], exact)
    eps = torch.finfo(torch.bfloat16).eps
    allowed = min(1.5 * eager_error + eps, NARROW_BOUND * eps) * exact.abs().max()
    names = [f"class {i}" for i in range(len(scores))]
    size = 1, 3, SIZE, SIZE
    dtypes = torch.float32, torch.bfloat16
    snv2.save_program(
        model, folder / "net.snv2", size, dtypes=dtypes, normalize=(MEAN, STD), classes=names
    )
    header = f"P6\n{SIZE} {SIZE}\n255\n".encode()
    (folder / "photo.ppm").write_bytes(header + image.numpy().tobytes())
    (folder / "scores.bin").write_bytes(scores.numpy().tobytes())
    (folder / "image.bin").write_bytes(narrow_x.view(torch.int16).numpy().tobytes())
    (folder / "exact.bin").write_bytes(torch.cat([exact, allowed[None]]).numpy().tobytes())
    likeliest = scores.softmax(0).topk(3)
    lines = [
        f"{100 * share:6.2f} %  {names[i]}\n"
        for share, i in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    ]
    (folder / "classes.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
