"""Writes a network, a picture and what Python makes of it into a folder, for tests of C++ on other
machines: net.snv2, photo.ppm, scores.bin (float32) and classes.txt (the likeliest three, a line
each, as examples/cpp shows them)."""

import sys
from pathlib import Path

import torch

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_

SIZE = 96


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model = randomize_(snv2.models.shufflenet_v2_x0_5(num_classes=30)).eval()
    with torch.no_grad():
        model.fc.weight *= 0.01  # so that no class gets it all
    snv2.save_program(
        model, folder / "net.snv2", (1, 3, SIZE, SIZE),
        normalize=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        classes=[f"class {i}" for i in range(30)],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator).to(torch.uint8)
    header = f"P6\n{SIZE} {SIZE}\n255\n".encode()
    (folder / "photo.ppm").write_bytes(header + image.numpy().tobytes())
    program = snv2.Program(folder / "net.snv2")
    scores = program(image[None])[0]
    (folder / "scores.bin").write_bytes(scores.numpy().tobytes())
    top = scores.softmax(0).topk(3)
    lines = [
        f"{100 * share:6.2f} %  {program.classes[i]}\n"
        for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    (folder / "classes.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
