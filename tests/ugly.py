"""Images as the world has them: every mode, depth and way of being broken."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30

GOOD = {  # name → what encoding must note of it
    "rgb.png": set(),
    "rgb.jpg": set(),
    "rgb.webp": set(),
    "rgb.bmp": set(),
    "rgb.tif": set(),
    "grey.png": {"grey"},
    "bilevel.png": {"grey"},
    "grey_alpha.png": {"grey", "alpha"},
    "alpha.png": {"alpha"},
    "palette.png": {"palette"},
    "palette_alpha.png": {"palette", "alpha"},
    "cmyk.jpg": {"cmyk"},
    "grey16.png": {"grey", "16-bit"},
    "grey16.tif": {"grey", "16-bit"},
    "rgb16.png": {"16-bit"},
    "rotated.jpg": {"exif-rotated"},
    "animated.gif": {"animated"},
}
BAD = ("truncated.jpg", "truncated.png", "empty.jpg", "text.jpg", "bomb.png", "float.tif", "notes.txt")


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colour, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 255 / height, columns * 255 / width, (rows + columns + 16 * seed) % 256]
    return np.stack(planes, -1).astype(np.uint8)


def png16(levels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG of uint16 [H, W, 3], which Pillow can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bomb() -> bytes:
    """A PNG that says it has 60,000 × 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def make(folder: Path) -> None:
    """Write every image of GOOD and BAD into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = Image.fromarray(picture())
    grey = rgb.convert("L")
    mask = Image.fromarray((picture()[..., 1] > 127).astype(np.uint8) * 255)
    levels = picture()[..., 0].astype(np.uint16) * 257
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        rgb.save(folder / f"rgb.{suffix}")
    grey.save(folder / "grey.png")
    grey.convert("1").save(folder / "bilevel.png")
    Image.merge("LA", (grey, mask)).save(folder / "grey_alpha.png")
    Image.merge("RGBA", (*rgb.split(), mask)).save(folder / "alpha.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.quantize(16).save(folder / "palette_alpha.png", transparency=0)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(levels).save(folder / "grey16.png")
    Image.fromarray(levels).save(folder / "grey16.tif")
    (folder / "rgb16.png").write_bytes(png16(picture().astype(np.uint16) * 257))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "rotated.jpg", exif=exif)
    frames = [Image.fromarray(picture(seed)).quantize(32) for seed in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    _broken(folder)


def _broken(folder: Path) -> None:
    for name in ("truncated.jpg", "truncated.png"):
        whole = (folder / name.replace("truncated", "rgb")).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "bomb.png").write_bytes(bomb())
    Image.fromarray(np.linspace(-3, 9, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)).save(
        folder / "float.tif"
    )
    (folder / "notes.txt").write_text("notes")
