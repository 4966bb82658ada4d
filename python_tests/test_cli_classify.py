"""``snv2 classify``."""

from __future__ import annotations

import struct
import types
import urllib.error
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cli import Image, noisy_image, run, save_picture, save_weights

from snv2_bench.cli import images, weights
from snv2_bench.cli.classify import class_names, resize_of
from snv2_bench.cli.common import WIDTHS
from snv2_bench.cli.images import authors_pixels, preprocess, read_image
from snv2_kernels import models
from snv2_kernels.testing import randomize_


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_picture(tmp_path_factory.mktemp("images"))


def top(result: Any) -> list[tuple[str, float]]:
    """Classes and probabilities in the table that was printed."""
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    return [(row[1].strip(), float(row[2].strip().rstrip("%")) / 100) for row in rows]


def classify(state: Path, *images: Path) -> Any:
    return run("classify", "--width", "x0.5", "--weights", state, *images)


def test_classify(state_file: Path, picture: Path) -> None:
    result = classify(state_file, picture)
    assert result.exit_code == 0, result.output
    assert str(picture) in result.output.splitlines()
    model = WIDTHS["x0.5"]().eval()
    model.load_state_dict(torch.load(state_file, weights_only=True))
    with torch.no_grad():
        expected = model(preprocess(read_image(picture), 256, 224)[None]).softmax(1).topk(5)
    names, probabilities = zip(*top(result), strict=True)
    assert list(names) == [class_names(1000)[i] for i in expected.indices[0]]
    assert torch.tensor(probabilities).allclose(expected.values[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "no such GPU"), ("tpu", "expected cpu or cuda")]
)
def test_classify_on_no_such_device(
    state_file: Path, picture: Path, device: str, message: str
) -> None:
    result = run("classify", "--device", device, "--weights", state_file, picture)
    assert result.exit_code == 2
    assert f"--device': {device}: " in result.output
    assert message in result.output


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(300, 251), (251, 300), (224, 400), (60, 75)])
@pytest.mark.parametrize("resize", [256, 232])
def test_preprocessing_is_torchvisions(
    torchvision: types.ModuleType, tmp_path: Path, mode: str, size: tuple[int, int], resize: int
) -> None:
    from torchvision.transforms._presets import ImageClassification

    path = tmp_path / "image.tiff"
    noisy_image(mode, size).save(path)
    expected = ImageClassification(crop_size=224, resize_size=resize)
    with Image.open(path) as image:
        assert torch.equal(
            preprocess(read_image(path), resize, 224), expected(image.convert("RGB"))
        )


def test_published_weights_are_torchvisions(torchvision: types.ModuleType) -> None:
    for width, url in weights.PUBLISHED.items():
        name = f"ShuffleNet_V2_{width.upper().replace('.', '_')}_Weights"
        published = getattr(torchvision.models, name).IMAGENET1K_V1
        assert url == published.url
        assert published.transforms().resize_size == [resize_of(width)]
        assert class_names(1000) == published.meta["categories"]


def test_classify_with_other_classes(tmp_path: Path, picture: Path) -> None:
    model = randomize_(WIDTHS["x0.5"](num_classes=3))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "three.pth")
    result = classify(tmp_path / "three.pth", picture)
    assert result.exit_code == 0, result.output
    assert {name for name, _ in top(result)} == {"0", "1", "2"}


def test_classify_goes_on_after_a_bad_image(
    tmp_path: Path, state_file: Path, picture: Path
) -> None:
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(picture.read_bytes()[:2000])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    result = classify(state_file, corrupt, tmp_path / "missing.png", text, picture)
    assert result.exit_code == 1
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 3
    for line, name in zip(errors, ("corrupt.png", "missing.png", "text.jpg"), strict=True):
        assert name in line
    assert len(top(result)) == 5


def _claiming(width: int, height: int) -> bytes:
    """A PNG without pixels that says it has so many."""
    size = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))


def _write_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Odd images that are shown right, and those that cannot be."""
    rgb = noisy_image("RGB", (50, 40))
    palette = rgb.convert("P")
    good: dict[str, tuple[Any, dict[str, Any]]] = {
        "tall.png": (rgb.resize((1, 10_000)), {}),
        "wide.png": (rgb.resize((10_000, 1)), {}),
        "pixel.png": (rgb.resize((1, 1)), {}),
        "animated.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        "palette.png": (palette, {"transparency": bytes(range(200))}),
        "grey16.png": (Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "\udcff.png": (rgb, {}),  # no UTF-8
    }
    for name, (image, options) in good.items():
        image.save(folder / name, **options)
    bad = {
        "claims.png": _claiming(60_000, 60_000),
        "truncated.png": (folder / "tall.png").read_bytes()[:1000],
        "empty.png": b"",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.ones((9, 9), np.float32)).save(folder / "float.tiff")
    return [folder / name for name in good], [folder / name for name in (*bad, "float.tiff")]


def test_odd_images_are_right_or_one_line(
    tmp_path: Path, state_file: Path, recwarn: pytest.WarningsRecorder
) -> None:
    good, bad = _write_images(tmp_path)
    result = classify(state_file, *good)
    assert result.exit_code == 0, result.output
    assert len(top(result)) == 5 * len(good)
    result = classify(state_file, *bad)
    assert result.exit_code == 1
    for path, line in zip(bad, result.output.splitlines(), strict=True):
        assert line.startswith(f"Error: {path}: not a")
    assert not [w for w in recwarn if w.filename.endswith("Image.py")]


def test_images_of_16_bits_keep_their_contrast(tmp_path: Path) -> None:
    grey = noisy_image("L", (50, 40))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(read_image(tmp_path / "grey16.png"), grey.convert("RGB"))


def test_the_crop_alone_is_what_the_whole_resized_image_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To a level of 255: pillow takes corners in single precision."""
    for size in ((1, 99), (99, 1), (3, 77), (300, 251), (1, 1)):
        image = noisy_image("RGB", size)
        whole = authors_pixels(image, 256, 224)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_MOST_PIXELS", 0)
            assert (authors_pixels(image, 256, 224) - whole).abs().max() <= 1


def test_classify_missing_weights_file(tmp_path: Path, picture: Path) -> None:
    result = classify(tmp_path / "missing.pth", picture)
    assert result.exit_code == 2
    assert "--weights" in result.output
    assert "does not exist" in result.output


class _RunsCode:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a file of weights ran",)


def _without_fc(state: dict[str, Any]) -> Any:
    return {k: v for k, v in state.items() if k != "fc.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(_without_fc, "fc.bias is missing"),
     (lambda s: {**s, "more": torch.ones(1)}, "more is not a name of this network"),
     (lambda s: {**s, "fc.bias": torch.ones(7)}, "fc.bias has shape (7,), expected (1000,)"),
     (lambda s: {"more": s}, "not a state_dict (names and tensors)"),
     (lambda s: torch.ones(3), "not a state_dict (names and tensors)"),
     (lambda s: WIDTHS["x2.0"]().state_dict(), "does not fit width x0.5; it fits --width x2.0"),
     (lambda s: models.shufflenet_v2_star("0.5x").state_dict(), "it fits a ShuffleNetV2 "),
     (lambda s: {**s, "fc.bias": s["fc.bias"] / 0}, "fc.bias holds NaN or infinity"),
     (lambda s: {**s, "fc.bias": s["fc.bias"].to("meta")}, "fc.bias is a meta tensor, expected"),
     (lambda s: {**s, "fc.bias": s["fc.bias"].to_sparse()}, "fc.bias is a torch.sparse_coo tensor"),
     (lambda s: {**s, "fc.weight": torch.ones(1).expand(5 * 10**15, 1024)}, "sizes cannot be made"),
     (lambda s: {**s, "fc.bias": _RunsCode()}, "not a state_dict saved by torch.save")],
)  # fmt: skip
def test_classify_weights_that_do_not_fit(
    tmp_path: Path, state_file: Path, picture: Path, change: Callable[..., Any], message: str
) -> None:
    path = tmp_path / "changed.pth"
    torch.save(change(torch.load(state_file, weights_only=True)), path)
    result = classify(path, picture)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: {path}: ")
    assert message in line


@pytest.mark.parametrize(
    ("make", "resize"),
    [(lambda: WIDTHS["x1.5"](num_classes=8), 232),
     (lambda: models.MegviiShuffleNetV2([1, 2, 1], [8, 12, 20, 32, 40], 8), 256),
     (lambda: models.ShuffleNetV2Plus([1] * 4, [8, 12, 20, 32, 48, 40], [0, 1, 2, 3], 8), 256)],
    ids=["x1.5", "megvii", "plus"],
)  # fmt: skip
def test_classify_with_other_layouts(
    tmp_path: Path, picture: Path, make: Callable[[], Any], resize: int
) -> None:
    """The width is the file's, the pixels what its authors trained on."""
    model = randomize_(make()).eval()
    [*_, last] = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        last.weight *= 1e-3 if resize == 256 else 1e-2
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    result = run("classify", "--weights", tmp_path / "weights.pth", picture)
    assert result.exit_code == 0, result.output
    x = preprocess(read_image(picture), resize, 224)
    if resize == 256:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x * std[:, None, None] + mean[:, None, None])[[2, 1, 0]] * 255
    with torch.no_grad():
        expected = model(x[None])[0].softmax(0).topk(5)
    assert len(set(expected.values.tolist())) == 5, "a network that does not tell classes apart"
    names, probabilities = zip(*top(result), strict=True)
    assert list(names) == [str(i) for i in expected.indices.tolist()]
    assert torch.tensor(probabilities).allclose(expected.values, rtol=0, atol=1e-4)


def test_classify_damaged_weights_file(tmp_path: Path, state_file: Path, picture: Path) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(state_file.read_bytes()[:10_000])
    result = classify(path, picture)
    assert result.exit_code == 2
    assert result.output.splitlines() == [f"Error: {path}: not a state_dict saved by torch.save"]


@pytest.mark.parametrize(
    ("error", "message"),
    [(urllib.error.URLError("no route to host"), "no route to host; give a file with --weights"),
     (RuntimeError("invalid hash value"), "damaged; delete ")],
)  # fmt: skip
def test_classify_without_published_weights(
    monkeypatch: pytest.MonkeyPatch, picture: Path, error: Exception, message: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    result = run("classify", "--width", "x1.5", picture)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert message in line
    assert weights.PUBLISHED["x1.5"] in line


def test_classify_with_published_weights(
    monkeypatch: pytest.MonkeyPatch, state_file: Path, picture: Path
) -> None:
    def download(url: str, **options: Any) -> Any:
        assert url == weights.PUBLISHED["x0.5"]
        assert options["check_hash"]
        assert options["weights_only"]
        return torch.load(state_file, weights_only=True)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    result = run("classify", "--width", "x0.5", picture)
    assert result.exit_code == 0, result.output
    assert top(result) == top(classify(state_file, picture))
