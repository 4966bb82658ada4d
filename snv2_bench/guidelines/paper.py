"""The paper's speeds: a GTX 1080 Ti with cuDNN 7, and one thread of a Snapdragon 810."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GUIDELINES", "SCALES", "TABLE8", "Row", "Speed"]

SCALES = (1, 2, 4)  # of all channels


@dataclass(frozen=True)
class Row:
    """One set-up of Tables 1 to 4 on one device.

    Attributes:
        setting: what is varied.
        channels: at scale 1.
        per_s: batches (GPU) or images (ARM) a second at each of :data:`SCALES`.
    """

    setting: str
    channels: tuple[int, ...]
    per_s: tuple[float, float, float]


# By table and type of device. Channels are (c1, c2) in G1, those of the map in the others; in G3
# those of "1-fragment", to whose multiply-adds the others are adjusted.
GUIDELINES: dict[str, dict[str, tuple[Row, ...]]] = {
    "G1": {
        "cuda": (
            Row("1:1", (128, 128), (1480, 723, 232)),
            Row("1:2", (90, 180), (1296, 586, 206)),
            Row("1:6", (52, 312), (876, 489, 189)),
            Row("1:12", (36, 432), (748, 392, 163)),
        ),
        "cpu": (
            Row("1:1", (32, 32), (76.2, 21.7, 5.3)),
            Row("1:2", (22, 44), (72.9, 20.5, 5.1)),
            Row("1:6", (13, 78), (69.1, 17.9, 4.6)),
            Row("1:12", (9, 108), (57.6, 15.1, 4.4)),
        ),
    },
    "G2": {
        "cuda": (
            Row("g=1", (128,), (2451, 1289, 437)),
            Row("g=2", (180,), (1725, 873, 341)),
            Row("g=4", (256,), (1026, 644, 338)),
            Row("g=8", (360,), (634, 445, 230)),
        ),
        "cpu": (
            Row("g=1", (64,), (40.0, 10.2, 2.3)),
            Row("g=2", (90,), (35.0, 9.5, 2.2)),
            Row("g=4", (128,), (32.9, 8.7, 2.1)),
            Row("g=8", (180,), (27.8, 7.5, 1.8)),
        ),
    },
    "G3": {
        "cuda": (
            Row("1-fragment", (128,), (2446, 1274, 434)),
            Row("2-series", (128,), (1790, 909, 336)),
            Row("4-series", (128,), (752, 745, 349)),
            Row("2-parallel", (128,), (1537, 803, 320)),
            Row("4-parallel", (128,), (691, 572, 292)),
        ),
        "cpu": (
            Row("1-fragment", (64,), (40.2, 10.1, 2.3)),
            Row("2-series", (64,), (38.6, 10.1, 2.2)),
            Row("4-series", (64,), (38.4, 10.1, 2.3)),
            Row("2-parallel", (64,), (33.4, 9.1, 2.2)),
            Row("4-parallel", (64,), (35.0, 8.4, 2.1)),
        ),
    },
    "G4": {
        "cuda": (
            Row("ReLU, shortcut", (32,), (2427, 2066, 1436)),
            Row("ReLU", (32,), (2647, 2256, 1735)),
            Row("shortcut", (32,), (2672, 2121, 1458)),
            Row("neither", (32,), (2842, 2376, 1782)),
        ),
        "cpu": (
            Row("ReLU, shortcut", (32,), (56.7, 16.9, 5.0)),
            Row("ReLU", (32,), (61.9, 18.8, 5.2)),
            Row("shortcut", (32,), (57.3, 18.2, 5.1)),
            Row("neither", (32,), (66.3, 20.2, 5.4)),
        ),
    },
}


@dataclass(frozen=True)
class Speed:
    """One model of Table 8 on the GPU, batch 8."""

    model: str
    size: str
    extent: int  # of the image
    per_s: float  # batches


TABLE8 = (
    Speed("ShuffleNet v2", "0.5x", 224, 417),
    Speed("ShuffleNet v2", "1.0x", 224, 341),
    Speed("ShuffleNet v2", "1.5x", 224, 255),
    Speed("ShuffleNet v2", "2.0x", 224, 217),
    Speed("MobileNet v1", "0.25", 224, 502),
    Speed("MobileNet v1", "0.5", 224, 382),
    Speed("MobileNet v1", "0.75", 224, 314),
    Speed("MobileNet v1", "1.0", 224, 247),
    Speed("MobileNet v2", "0.4", 160, 333),
    Speed("MobileNet v2", "0.75", 192, 235),
    Speed("MobileNet v2", "1.0", 224, 180),
    Speed("MobileNet v2", "1.4", 224, 137),
    Speed("ShuffleNet v1", "0.5x", 224, 347),
    Speed("ShuffleNet v1", "1.0x", 224, 213),
    Speed("ShuffleNet v1", "1.5x", 224, 164),
    Speed("ShuffleNet v1", "2.0x", 224, 133),
)
