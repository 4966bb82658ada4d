"""Train a small detector on a ShuffleNet V2 backbone, and evaluate it with the backbone fused.

    python examples/detector.py --steps 400

What it shows:

- `snv2.fuse(model)` fuses what it finds inside a model of your own: here a backbone that returns
  two maps becomes one op call, and the head stays as it is.
- In train() mode the fused model is the plain one: gradients flow, batch norm statistics move, any
  optimizer works. In eval() mode it is fused, and follows every step of the training.
- Both share their parameters, so the plain model is trained as well, and finds the same boxes.

The detector is of one stage and without anchors. Each cell of a map of a sixteenth of the picture's
size tells for each class whether the centre of an object lies in it, and how far away the four
sides of the object's box are. It learns to find discs and rectangles in pictures that it draws.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

STRIDE = 16  # pixels of a cell
CLASSES = ("disc", "rectangle")


class Backbone(nn.Module):
    """Maps [N, 96, ...] and [N, 192, ...], a sixteenth and a thirty-second of the picture's size.

    Weights for ImageNet, torchvision's among them, fit after `load_state_dict(..., strict=False)`.
    """

    def __init__(self) -> None:
        super().__init__()
        network = snv2.models.shufflenet_v2_x0_5()
        self.conv1, self.maxpool = network.conv1, network.maxpool
        self.stage2, self.stage3, self.stage4 = network.stage2, network.stage3, network.stage4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stage3(self.stage2(self.maxpool(self.conv1(x))))
        return x, self.stage4(x)


class Detector(nn.Module):
    """From [N, 3, H, W] to logits [N, classes, h, w] and boxes [N, 4, h, w] in pixels."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.near, self.far = nn.Conv2d(96, channels, 1), nn.Conv2d(192, channels, 1)
        self.mix = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.classes = nn.Conv2d(channels, len(CLASSES), 1)
        self.sides = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.classes.bias, -3.0)  # objects are rare

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near, far = self.backbone(x)
        far = F.interpolate(self.far(far), size=near.shape[2:], mode="nearest")
        x = self.mix(self.near(near) + far)
        return self.classes(x), self._boxes(F.softplus(self.sides(x)) * STRIDE)

    @staticmethod
    def _boxes(sides: Tensor) -> Tensor:
        """Left, top, right and bottom, of their distances from the middle of each cell."""
        h, w = sides.shape[2:]
        y, x = ((torch.arange(n, device=sides.device) + 0.5) * STRIDE for n in (h, w))
        middle = torch.stack([x.expand(h, w), y[:, None].expand(h, w)])
        return torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], 1)


@dataclass(frozen=True)
class Batch:
    """Pictures, and in the cell of each object's centre its class and box."""

    pictures: Tensor  # [N, 3, size, size]
    present: Tensor  # [N, classes, h, w], 0 or 1
    boxes: Tensor  # [N, 4, h, w]


def draw(count: int, size: int, generator: torch.Generator) -> Batch:
    """Draw discs and rectangles on noise, up to three in a picture."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    cells = size // STRIDE
    pictures = 0.3 * torch.randn(count, 3, size, size, generator=generator)
    present = torch.zeros(count, len(CLASSES), cells, cells)
    boxes = torch.zeros(count, 4, cells, cells)
    row, column = torch.arange(size)[:, None] + 0.5, torch.arange(size) + 0.5
    for i in range(count):
        for _ in range(number(1, 4)):
            kind, width = number(0, 2), number(size // 6, size // 3)
            height = width if CLASSES[kind] == "disc" else number(size // 6, size // 3)
            x, y = number(width // 2, size - width // 2), number(height // 2, size - height // 2)
            across, down = (column - x).abs() / width, (row - y).abs() / height
            inside = (
                across**2 + down**2 < 0.25
                if CLASSES[kind] == "disc"
                else torch.maximum(across.expand(size, size), down.expand(size, size)) < 0.5
            )
            pictures[i][:, inside] += torch.randn(3, 1, generator=generator).sign() * 2
            place = i, slice(None), y // STRIDE, x // STRIDE
            present[place] = 0  # of two objects in a cell the later one lies above
            present[i, kind, y // STRIDE, x // STRIDE] = 1
            boxes[place] = torch.tensor(
                [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            )
    return Batch(pictures, present, boxes)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp_min(1e-6)


def loss_of(logits: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
    """Focal loss of the classes, and what the boxes of the objects lack of a full overlap."""
    wrong = (batch.present - logits.sigmoid()).abs()
    entropy = F.binary_cross_entropy_with_logits(logits, batch.present, reduction="none")
    objects = batch.present.amax(1) > 0
    found, true = (t.permute(0, 2, 3, 1)[objects] for t in (boxes, batch.boxes))
    # Distances pull where boxes do not meet yet.
    far = F.l1_loss(found, true) / STRIDE
    return (wrong**2 * entropy).sum() / objects.sum() + far + (1 - overlap(found, true)).mean()


def train(model: nn.Module, steps: int, size: int, batch: int = 16) -> list[float]:
    """Train in place; the losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    model.train()
    for _ in range(steps):
        data = draw(batch, size, generator)
        loss = loss_of(*model(data.pictures), data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, data: Batch, threshold: float = 0.4) -> tuple[float, float]:
    """Precision and recall; a hit is a peak in an object's cell, of its class and half its box."""
    model.eval()
    logits, boxes = model(data.pictures)
    scores = logits.sigmoid()
    peaks = (scores > threshold) & (scores == F.max_pool2d(scores, 3, 1, 1))
    fits = overlap(boxes.permute(0, 2, 3, 1), data.boxes.permute(0, 2, 3, 1)) > 0.5
    hits = (peaks & (data.present > 0) & fits[:, None]).sum().item()
    return hits / max(1, int(peaks.sum())), hits / max(1, int(data.present.sum()))


@torch.no_grad()
def milliseconds(models: dict[str, nn.Module], x: Tensor, calls: int = 20) -> dict[str, float]:
    """Median times of calls that take turns, so that a slower moment slows all."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(calls):
        for name, model in models.items():
            model(x)  # its weights are in the caches again
            start = time.perf_counter()
            model(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train a detector; evaluate it plain and fused.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=128, help="of a picture, a multiple of 32")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    plain = Detector()
    fused = snv2.fuse(plain)
    print(snv2.explain(plain.eval()))

    losses = train(fused, options.steps, options.size)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {options.steps} steps")

    data = draw(64, options.size, torch.Generator().manual_seed(2))
    precision, recall = evaluate(fused, data)
    print(f"precision {precision:.2f}, recall {recall:.2f}, of {int(data.present.sum())} objects")

    plain.eval()
    with torch.no_grad():
        outputs = zip(fused(data.pictures), plain(data.pictures), strict=True)
        error = max(max_error(ours, theirs) for ours, theirs in outputs)
    times = milliseconds({"plain": plain, "fused": fused}, data.pictures[:1])
    print(f"fused and plain differ by {error:.1e} of the largest value")
    print(f"one picture: plain {times['plain']:.2f} ms, fused {times['fused']:.2f} ms")
    return {
        "first_loss": losses[0], "last_loss": losses[-1], "precision": precision,
        "recall": recall, "error": error,
    }  # fmt: skip


if __name__ == "__main__":
    main()
