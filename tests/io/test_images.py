"""Pictures: what is read is what is seen, and a bad file is one clear error that names it."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from stamina_fast.errors import FileError, InputError, StaminaError
from stamina_fast.io.files import sha256
from stamina_fast.io.images import (
    MAX_PIXELS,
    as_floats,
    check_image,
    crop,
    list_images,
    load_image,
    open_image,
    to_picture,
    write_image,
)

SIDE = 24


def picture(mode="RGB", size=(SIDE, SIDE + 8)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixels_of(image):
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def png_of(width, height):
    """A PNG that says it is large and holds no pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "jpg", "gif"])
def test_pictures_of_each_format(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    picture().save(path, **({"lossless": True} if kind == "webp" else {}))
    image = load_image(path)
    assert image.shape == (3, SIDE + 8, SIDE)
    assert image.dtype == torch.uint8
    floats = as_floats(image)
    assert floats.dtype == torch.float32
    assert floats.min() >= -1
    assert floats.max() <= 1
    if kind not in ("jpg", "gif"):
        assert torch.equal(image, pixels_of(picture()))
        assert to_picture(floats).tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "x.tiff"
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 0x8034, np.uint16)).save(path)
        assert open_image(path).getpixel((0, 0)) == (0x80,) * 3
    else:
        picture("L" if mode == "LA" else "RGB").convert(mode).save(path)
        assert open_image(path).mode == "RGB"


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.putpixel((3, 3), (255, 0, 0, 255))
    image.save(tmp_path / "x.png")
    seen = open_image(tmp_path / "x.png")
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((3, 3)) == (255, 0, 0)


def test_pictures_are_turned_upright(tmp_path):
    upright = picture("RGB", (20, 30))
    exif = Image.Exif()
    # the camera was turned: rotate by 270 degrees to see it
    exif[0x0112] = 8
    upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "x.png", exif=exif)
    assert open_image(tmp_path / "x.png").tobytes() == upright.tobytes()


BAD = {
    "empty.png": b"", "text.jpg": b"this is no picture", "zeros.png": b"\0" * 1000, "huge.png": png_of(100_000, 100_000),
    "large.png": png_of(9000, 8000), "lines.png": png_of(64, 64), "tall.png": png_of(1, 2**31 - 1), "none.png": png_of(0, 0),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    for read in (load_image, *([] if name == "lines.png" else [check_image])):
        with pytest.raises(InputError) as caught:
            read(path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "jpg", "gif"])
@pytest.mark.parametrize("keep", [1.0, 0.95, 0.5])
def test_a_cut_off_png_or_jpeg_is_found_without_decoding(tmp_path, monkeypatch, kind, keep):
    """With a thumbnail in front, which ends as a JPEG does."""
    thumbnail = io.BytesIO()
    picture("RGB", (16, 16)).save(thumbnail, "JPEG")
    exif = Image.Exif()
    # the maker's note, of any bytes
    exif[0x927C] = thumbnail.getvalue()
    path = tmp_path / f"x.{kind}"
    picture("RGB", (200, 160)).save(path, **({"exif": exif} if kind in ("jpg", "png", "webp") else {}))
    data = path.read_bytes()
    assert kind != "jpg" or thumbnail.getvalue() in data
    path.write_bytes(data[: int(len(data) * keep)])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    if keep < 1 and kind in ("png", "jpg"):
        with pytest.raises(InputError, match=rf"x\.{kind}.*truncated|x\.{kind}.*broken|x\.{kind}.*Truncated"):
            check_image(path)
    elif keep == 1:
        assert check_image(path) == sha256(data)


def test_nothing_is_decoded_above_the_cap(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png_of(MAX_PIXELS // 8000 + 1, 8000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="make it smaller"):
        open_image(tmp_path / "x.png")


def test_tiny_missing_and_folders(tmp_path):
    picture("RGB", (4, 40)).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match=r"4 x 40 pixels.*larger"):
        load_image(tmp_path / "tiny.png")
    for path in (tmp_path, tmp_path / "missing.png", tmp_path / "a\0b"):
        with pytest.raises(InputError, match="is not a file"):
            load_image(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(FileError, match="Permission denied; check its permissions"):
        open_image(tmp_path / "x.png")


def test_a_thousand_bad_files(tmp_path):
    """Cut, changed and mixed-up pictures of every format: read, or refused in one line; never anything else."""
    rng, refused = random.Random(0), 0
    good = []
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        picture().save(tmp_path / f"good.{kind}")
        good.append((tmp_path / f"good.{kind}").read_bytes())
    path = tmp_path / "bad.png"
    for _ in range(1000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(0, 12)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        cut = rng.randrange(len(data))
        path.write_bytes(rng.choice([data, data[:cut], data[:cut] + rng.choice(good)]))
        with contextlib.suppress(StaminaError):
            check_image(path)
        try:
            image = load_image(path)
            assert image.shape[0] == 3
        except StaminaError as error:
            refused += 1
            assert "bad.png" in str(error)  # noqa: PT017
    assert refused > 500


def test_listing(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "c.jpeg"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.jpeg"]
    (tmp_path / "phone.HEIC").touch()
    with pytest.raises(InputError, match=r"phone\.HEIC.*JPEG or PNG"):
        list_images(tmp_path)
    with pytest.raises(FileError, match="No such file"):
        list_images(tmp_path / "missing")


def test_crops():
    image = pixels_of(picture("RGB", (30, 20)))
    floats = as_floats(image)
    for given in (image, floats):
        assert torch.equal(crop(given, 20)[0], floats[:, :, 5:25])
        assert torch.equal(crop(given, 20, position=(0, 0))[0], floats[:, :, :20])
        assert torch.equal(crop(given, 20, position=(1, 1), flip=True)[0], floats[:, :, 10:].flip(-1))
    small, frame = crop(image, 8)
    assert small.shape == (3, 8, 8)
    assert small.abs().max() <= 1
    assert abs(small.mean() - floats[:, :, 5:25].mean()) < 0.02
    assert frame.tolist() == [8, 12, 0, 2]
    assert torch.equal(crop(floats, 8)[0], small)


def test_written_pictures_are_read_again(tmp_path):
    image = pixels_of(picture())
    write_image(tmp_path / "x.png", as_floats(image))
    write_image(tmp_path / "y.png", picture())
    assert torch.equal(load_image(tmp_path / "x.png"), image)
    assert torch.equal(load_image(tmp_path / "y.png"), image)
