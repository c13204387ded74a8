"""Pages of networks in a headless Chromium: outputs, pictures, drawings, damage."""

import base64
import hashlib
import io
import json
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, browser_page
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

import growfx

pytestmark = pytest.mark.slow
HEADER = 4 + 4 + 32  # of network.gfx: magic, version, SHA-256 of what follows


class Classifier(nn.Module):
    """Classes of small images."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Generator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[growfx.MaskedGraph, Path]:
    """A network of grey images and its page."""
    torch.manual_seed(0)
    net = growfx.wrap(Classifier(1), torch.rand(1, 1, 16, 16), density=0.5).eval()
    origin = {"data": {"spec": "digits", "classes": ["zero", "one", "two", "<b>three"]}}
    return net, growfx.export_web(net, tmp_path_factory.mktemp("small") / "web", provenance=origin).page


def sent(values: np.ndarray[Any, Any]) -> str:
    """A script's expression for an array of float32."""
    text = base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()
    return f'new Float32Array(bytesOf("{text}").buffer)'


def fetched(page: Page, expression: str) -> np.ndarray[Any, Any]:
    """An array of float32 that an expression gives, bit for bit."""
    script = f"(async () => {{ const v = await ({expression}); return btoa(Array.from(new Uint8Array(v.buffer, "
    script += "v.byteOffset, v.byteLength), (b) => String.fromCharCode(b)).join('')); })()"
    return np.frombuffer(base64.b64decode(page.value(script)), "<f4")


def png(pixels: np.ndarray[Any, Any]) -> tuple[Image.Image, str]:
    """An image, and a script's expression for its ImageData."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    image.save(stream, "png")
    text = base64.b64encode(stream.getvalue()).decode()
    script = (
        f'createImageBitmap(new Blob([bytesOf("{text}")], {{ type: "image/png" }})).then((bitmap) => {{'
        "const c = document.createElement('canvas'); c.width = bitmap.width; c.height = bitmap.height;"
        "const d = c.getContext('2d'); d.drawImage(bitmap, 0, 0); return d.getImageData(0, 0, c.width, c.height); })"
    )
    return image, script


def smooth(shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Colours that change slowly, with one edge: noise would overshoot wherever it is resized."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC))
    pixels[: shape[0] // 3, : shape[1] // 2] //= 2
    return pixels


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_resnet", 64, {}),
        ("test_vit", 160, {}),
        ("mobilenetv3_small_050", 64, {}),
        ("test_convnext", 64, {"in_chans": 1}),
        ("torchvision/squeezenet1_1", 64, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_browser_computes_the_outputs_of_torch(
    name: str, size: int, options: dict[str, Any], page: Page, tmp_path: Path
) -> None:
    model = growfx.create_model(name, num_classes=12, **options)
    image = torch.randn(1, options.get("in_chans", 3), size, size)
    net = growfx.wrap(model, image, density=0.3).eval()
    page.complaints.clear()
    page.open(growfx.export_web(net, tmp_path / "web").page)
    assert page.value("document.documentElement.dataset.state") == "ready"
    assert page.value("document.getElementById('alarm').hidden")
    assert "compared with PyTorch\tlargest difference" in page.value("document.getElementById('figures').innerText")
    for x in (image, 3 * torch.randn_like(image)):
        with torch.no_grad():
            expected = net(x)[0].numpy()
        found = fetched(page, f"network.run({sent(x.numpy())}).output")
        assert abs(found - expected).max() <= 1e-4 * abs(expected).max()
    assert page.complaints == []


def test_nan_and_infinity_reach_the_outputs_that_torch_says(small: tuple[growfx.MaskedGraph, Path], page: Page) -> None:
    net, file = small
    page.open(file)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(1, 1, 16, 16)
        x[0, 0, 3, 5] = value
        with torch.no_grad():
            expected = growfx.unwrap(net).eval()(x)[0].numpy()
        found = fetched(page, f"network.run({sent(x.numpy())}).output")
        # Weights without an edge are not computed with, so no more outputs may be lost than in torch.
        assert not (~np.isfinite(found) & np.isfinite(expected)).any()
    x = torch.randn(1, 1, 16, 16)
    again = fetched(page, f"network.run({sent(x.numpy())}).output")
    assert again == pytest.approx(net(x)[0].detach().numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "method", "crop"),
    [
        ((40, 60), (32, 32), "bilinear", 1.0),
        ((61, 33), (32, 32), "bicubic", 0.875),
        ((20, 20), (64, 64), "bicubic", 1.0),
        ((200, 90), (48, 48), "lanczos", 0.95),
        ((33, 47), (32, 32), "bilinear", 0.9),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_prepared_as_in_evaluation(
    shape: tuple[int, int], size: tuple[int, int], method: str, crop: float, channels: int, page: Page, small: Any
) -> None:
    page.open(small[1])
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    image, script = png(smooth(shape))
    transform: Any = create_transform(
        (channels, *size), interpolation=method, mean=mean, std=std, crop_pct=crop, crop_mode="center"
    )
    expected = transform(image.convert("L" if channels == 1 else "RGB")).numpy()
    form = {"channels": channels, "height": size[0], "width": size[1], "mean": mean, "std": std}
    form |= {"interpolation": method, "crop_pct": crop}
    found = fetched(page, f"{script}.then((image) => prepared(image, {json.dumps(form)}))").reshape(expected.shape)
    # Which of its two directions Pillow takes first depends on its version: bytes in between are rounded differently.
    levels = abs(found - expected) * 255 * np.array(std)[:, None, None]
    assert levels.max() <= 2.01
    assert (levels > 0.5).mean() < 0.2


def test_an_image_file_shows_the_classes_of_torch_with_their_shares(
    small: tuple[growfx.MaskedGraph, Path], page: Page, tmp_path: Path
) -> None:
    net, file = small
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    transform: Any = create_transform((1, 16, 16), interpolation="bilinear", mean=(0,), std=(1,), crop_pct=1.0)
    with torch.no_grad():
        shares = net(transform(Image.open(tmp_path / "image.png"))[None])[0].softmax(0)
    page.complaints.clear()
    page.open(file)
    page.choose("#choose", tmp_path / "image.png")
    page.wait_for("document.querySelectorAll('#classes li').length === 4")
    lines = page.value("document.getElementById('classes').innerText").split("\n")
    names = ["zero", "one", "two", "<b>three"]
    order = shares.argsort(descending=True).tolist()
    assert lines[::2] == [names[i] for i in order]
    found = [float(text.removesuffix(" %")) for text in lines[1::2]]
    assert found == pytest.approx([100 * float(shares[i]) for i in order], abs=0.2)
    assert "ms on this device" in page.value("document.getElementById('time').innerText")
    page.draw("#picture", [(0.5, 0.2), (0.5, 0.8)])  # a drawing takes the place of the image
    assert page.value("brush.getImageData(4, 176, 1, 1).data.slice(0, 3).join()") == "0,0,0"
    (tmp_path / "text.png").write_text("no image")
    page.choose("#choose", tmp_path / "text.png")
    page.wait_for("!document.getElementById('alarm').hidden")
    assert "text.png is not an image" in page.value("document.getElementById('alarm').innerText")
    assert page.complaints == []


def test_a_drawing_is_centred_and_runs_and_can_be_cleared(small: tuple[growfx.MaskedGraph, Path], page: Page) -> None:
    _, file = small
    page.complaints.clear()
    results: list[list[str]] = []
    for left in (0.2, 0.6):  # the same line at two places
        page.open(file)
        page.draw("#picture", [(left, 0.2), (left + 0.15, 0.5), (left, 0.8)])
        results.append(page.value("document.getElementById('classes').innerText").split("\n"))
    assert results[0] == results[1]
    assert len(results[0]) == 8
    page.value("document.getElementById('clear').click()")
    assert page.value("document.getElementById('classes').innerText") == ""
    assert not page.value("document.getElementById('hint').hidden")
    assert page.complaints == []


def test_where_channels_differ_nothing_can_be_drawn(page: Page, tmp_path: Path) -> None:
    origin = {"input": {"input_size": [3, 8, 8], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}}
    net = growfx.wrap(Classifier(), torch.rand(1, 3, 8, 8), density=0.5)
    page.open(growfx.export_web(net, tmp_path / "web", provenance=origin).page)
    page.draw("#picture", [(0.2, 0.2), (0.5, 0.5)])
    assert page.value("document.getElementById('classes').innerText") == ""
    assert "drop an image" in page.value("document.getElementById('hint').innerText").lower()


@pytest.mark.parametrize(("width", "dark"), [(340, True), (1200, False)])
def test_the_page_fits_phones_and_both_colour_schemes(width: int, dark: bool, small: Any, page: Page) -> None:
    page.open(small[1], width=width, dark=dark)
    page.draw("#picture", [(0.3, 0.2), (0.6, 0.8)])
    assert page.value("document.documentElement.scrollWidth") <= width
    colours = page.value("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, back = (sum(map(int, colour[4:-1].split(", "))) for colour in colours)
    assert (text > back) == dark
    assert abs(text - back) > 300


def resigned(body: bytes) -> bytes:
    """A file with this body whose checksum is right."""
    return b"GFX1" + (1).to_bytes(4, "little") + hashlib.sha256(body).digest() + body


def mutations(data: bytes, count: int) -> list[bytes]:
    """Files that a reader must refuse or run; most of them pass the checksum."""
    draw, found = random.Random(0), [b"", data[:3], data[:30], data[:-1], b"GFX2" + data[4:]]
    body = data[HEADER:]
    plan = len(body) // 4  # the plan comes before the weights
    while len(found) < count:
        changed = bytearray(body)
        for _ in range(draw.choice((1, 1, 2, 5))):
            kind, at = draw.randrange(4), draw.randrange(plan if draw.random() < 0.8 else len(body))
            if kind == 0:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            elif kind == 1:
                changed[at % len(changed)] = draw.choice((0, 127, 128, 255))
            elif kind == 2:
                del changed[at % len(changed) :][:1], changed[at % len(changed)]
            else:
                changed[at:at] = bytes(draw.choice(((255,) * 4 + (7,), (128,), (0,) * 8)))
        found.append(resigned(bytes(changed)))
    return found


def test_a_damaged_network_is_an_error_or_runs_within_its_memory(small: Any, page: Page) -> None:
    _, file = small
    page.open(file)
    held = base64.b64decode(page.value("document.getElementById('network').textContent"))
    page.value(
        "window.tried = async (text) => { try { const made = await Network.open(bytesOf("
        "document.getElementById('runtime').textContent.trim()), bytesOf(text));"
        "made.run(new Float32Array(product(made.inputShape))); return 'ran'; } catch (error) {"
        "return `${error.constructor.name}: ${error.message}`; } }; 0"
    )
    files = mutations(held, 300)
    told = [page.value(f"tried('{base64.b64encode(data).decode()}')") for data in (held, *files)]
    assert told[0] == "ran"
    assert all(text.startswith("Error: ") and len(text) > 20 for text in told[1:6])
    refused = [text for text in told[1:] if text.startswith("Error: ")]
    assert len(refused) > 100
    # The runtime ends by itself where memory runs out; it never reads or writes where it has none.
    others = {text for text in told[1:] if not text.startswith("Error: ") and text != "ran"}
    assert others <= {"RuntimeError: unreachable"}


def test_a_page_whose_network_is_damaged_says_so(small: Any, page: Page, tmp_path: Path) -> None:
    text = small[1].read_text()
    start = text.index('id="network" type="text/plain">') + 120
    (tmp_path / "bad.html").write_text(text[:start] + ("A" if text[start] != "A" else "B") + text[start + 1 :])
    page.open(tmp_path / "bad.html")
    assert page.value("document.documentElement.dataset.state") == "failed"
    assert "damaged" in page.value("document.getElementById('alarm').innerText")
