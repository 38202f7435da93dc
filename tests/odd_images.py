"""Image files as people have them, odd ones and broken ones: what tests of everything that reads images are run on.

Readable ones are dark on the left and bright on the right, whatever their format, mode, depth or orientation, so that
a test sees whether they came out upright and in their range.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

HEIGHT, WIDTH = 40, 60
ORIENTATION = 0x0112
DARK, BRIGHT = (40, 25, 60), (235, 250, 220)


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Return what all readable files show, as a PIL image of a mode; `size` is (width, height)."""
    image = Image.new("RGB", size, DARK)
    image.paste(BRIGHT, (size[0] // 2, 0, *size))
    if mode == "LAB":
        return ImageCms.applyTransform(
            image, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        )
    return image.convert(mode)


def levels(low: float, high: float, dtype: Any) -> np.ndarray:
    """Return the picture as measurements: `low` on the left, `high` on the right; `[H, W]`."""
    return np.where(np.arange(WIDTH) < WIDTH // 2, low, high).astype(dtype)[None].repeat(HEIGHT, 0)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of a file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lying(orientation: int, kind: str, **options: Any) -> bytes:
    """Return the picture stored so that only its EXIF orientation brings it upright."""
    exif = Image.Exif()
    exif[ORIENTATION] = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # what undoes it
    template = picture()
    template.getexif().update(exif)
    stored = ImageOps.exif_transpose(template)
    exif[ORIENTATION] = orientation
    return saved(stored, kind, exif=exif, **options)


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of these chunks, each with its right checksum."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def png_head(width: int, height: int, depth: int = 8, color: int = 2, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)


def png_pixels(pixels: np.ndarray) -> tuple[bytes, bytes]:
    """Return the chunk of rows of `[H, bytes]`, unfiltered."""
    return b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


END = (b"IEND", b"")


def deep_png() -> bytes:
    """Return an RGB PNG of 16 bits a channel, which Pillow reads and does not write."""
    deep = np.asarray(picture()).astype(">u2") * 257
    return png_of(png_head(WIDTH, HEIGHT, 16), png_pixels(deep.reshape(HEIGHT, -1)), END)


def spider() -> bytes:
    return saved(Image.fromarray(levels(-3.5, 12.0, np.float32)), "SPIDER")


def netpbm(kind: bytes, values: np.ndarray, most: int) -> bytes:
    """Return a netpbm file in text."""
    height, width = values.shape[:2]
    head = b"%s\n# a comment\n%d %d\n" % (kind, width, height) + (b"" if kind == b"P1" else b"%d\n" % most)
    return head + b"\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in values) + b"\n"


def fits() -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += [f"NAXIS1  = {WIDTH:20}", f"NAXIS2  = {HEIGHT:20}", "END"]
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return head + levels(20, 240, np.uint8).tobytes().ljust(2880, b"\0")


def sun_raster() -> bytes:
    gray = np.asarray(picture("L"))
    return struct.pack(">8I", 0x59A66A95, WIDTH, HEIGHT, 8, gray.size, 1, 0, 0) + gray.tobytes()


def xpm() -> bytes:
    row = "a" * (WIDTH // 2) + "b" * (WIDTH // 2)
    rows = [f"{WIDTH} {HEIGHT} 2 1", "a c #28193C", "b c #EBFADC", *[row] * HEIGHT]
    return ("/* XPM */\nstatic char *x[] = {\n" + ",\n".join(f'"{line}"' for line in rows) + "\n};\n").encode()


def bottom_up_bmp() -> bytes:
    """Return a BMP whose height is negative: its rows go downwards."""
    data = bytearray(saved(picture(), "BMP"))
    data[22:26] = struct.pack("<i", -HEIGHT)
    return bytes(data)


def cursor() -> bytes:
    data = bytearray(saved(picture("RGBA", (32, 32)), "ICO", sizes=[(32, 32)], bitmap_format="bmp"))
    data[2] = 2
    return bytes(data)


def adobe_transformed() -> bytes:
    """Return a JPEG of four channels, of which the first three are YCC: its Adobe marker says transform 2."""
    data = bytearray(saved(picture("CMYK"), "JPEG", quality=95))
    at = data.find(b"Adobe")
    data[at + 11] = 2
    return bytes(data)


def with_exif(exif: bytes) -> bytes:
    """Return a JPEG whose EXIF is these bytes."""
    return saved(picture(), "JPEG", exif=b"Exif\0\0" + exif)


def tiff_of(array: np.ndarray, **options: Any) -> bytes:
    return saved(Image.fromarray(array), "TIFF", **options)


def half_transparent(mode: str = "RGBA") -> Image.Image:
    """Return the picture with its bright half transparent over black: on white it is bright all the same."""
    image = picture("RGBA")
    image.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return image.convert(mode)


def frames() -> dict[str, Any]:
    """Return what makes an animation of the picture: further frames are its mirror."""
    return {"save_all": True, "append_images": [ImageOps.mirror(picture())] * 2}


READABLE: dict[str, Callable[[], bytes]] = {
    # JPEG
    "rgb.jpg": lambda: saved(picture(), "JPEG"),
    "gray.jpg": lambda: saved(picture("L"), "JPEG"),
    "cmyk.jpg": lambda: saved(picture("CMYK"), "JPEG"),
    "progressive.jpg": lambda: saved(picture(), "JPEG", progressive=True),
    "restart-markers.jpg": lambda: saved(picture(), "JPEG", restart_marker_rows=1),
    "no-subsampling.jpg": lambda: saved(picture(), "JPEG", subsampling=0, quality=100),
    "trailing-bytes.jpg": lambda: saved(picture(), "JPEG") + b"\0" * 1000 + b"more",
    "comment.jpg": lambda: saved(picture(), "JPEG", comment=b"\xff\xfe not \x00 text"),
    "large-profile.jpg": lambda: saved(picture(), "JPEG", icc_profile=bytes(200_000)),
    "damaged-exif.jpg": lambda: with_exif(b"MM\0*\0\0\0\x08\xff\xff" + bytes(20)),
    "no-exif-at-all.jpg": lambda: with_exif(b"these are no tags"),
    "orientation-9.jpg": lambda: with_exif(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0" + bytes(4)),
    **{f"orientation-{n}.jpg": lambda n=n: lying(n, "JPEG", subsampling=0) for n in range(1, 9)},  # type: ignore[misc]
    "phone.mpo": lambda: saved(picture(), "MPO", save_all=True, append_images=[ImageOps.mirror(picture())]),
    "really-a-png.jpg": lambda: saved(picture(), "PNG"),
    # PNG
    "bilevel.png": lambda: saved(picture("1"), "PNG"),
    "gray.png": lambda: saved(picture("L"), "PNG"),
    "gray-alpha.png": lambda: saved(half_transparent("LA"), "PNG"),
    "gray-16-bit.png": lambda: saved(Image.fromarray(levels(4000, 60000, np.uint16)), "PNG"),
    "rgb-16-bit.png": deep_png,
    "palette.png": lambda: saved(picture("P"), "PNG"),
    "palette-1-bit.png": lambda: saved(picture().quantize(2), "PNG", bits=1),
    "palette-transparent.png": lambda: saved(half_transparent().quantize(16), "PNG"),
    "rgb.png": lambda: saved(picture(), "PNG"),
    "rgb-transparent-color.png": lambda: saved(picture(), "PNG", transparency=BRIGHT),
    "rgba.png": lambda: saved(half_transparent(), "PNG"),
    "interlaced.png": lambda: png_of(
        png_head(2, 1, 8, 0, 1),
        # Its first pass has the left pixel, its sixth the right one.
        (b"IDAT", zlib.compress(b"\0\x20" + b"\0\xf0")),
        END,
    ),
    "orientation-6.png": lambda: lying(6, "PNG"),
    "damaged-exif.png": lambda: saved(picture(), "PNG", exif=b"MM\0*\0\0\0\x08\xff\xff" + bytes(20)),
    "long-text.png": lambda: png_of(
        png_head(WIDTH, HEIGHT),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 500_000)),
        png_pixels(np.asarray(picture()).reshape(HEIGHT, -1)),
        END,
    ),
    "animated.png": lambda: saved(picture(), "PNG", **frames()),
    "wide.png": lambda: saved(picture(size=(20000, 1)), "PNG"),
    # GIF
    "palette.gif": lambda: saved(picture("P"), "GIF"),
    "animated.gif": lambda: saved(picture(), "GIF", **frames()),
    "transparent.gif": lambda: saved(half_transparent(), "GIF"),
    # TIFF
    "bilevel-fax.tif": lambda: saved(picture("1"), "TIFF", compression="group4"),
    "gray-16-bit.tif": lambda: tiff_of(levels(4000, 60000, np.uint16)),
    "gray-16-bit-big-endian.tif": lambda: tiff_of(levels(4000, 60000, ">u2")),
    "gray-32-bit.tif": lambda: tiff_of(levels(0, 60000, np.int32)),
    "elevation-32-bit.tif": lambda: tiff_of(levels(-400, 3_000_000, np.int32)),
    "share-float.tif": lambda: tiff_of(levels(0.1, 0.9, np.float32)),
    "temperature-float.tif": lambda: tiff_of(levels(-40.0, 1000.0, np.float32)),
    "holes-float.tif": lambda: tiff_of(np.vstack([levels(-5, 900, np.float32), [[np.nan, np.inf] * (WIDTH // 2)]])),
    "rgb-lzw.tif": lambda: saved(picture(), "TIFF", compression="tiff_lzw"),
    "rgba-deflate.tif": lambda: saved(half_transparent(), "TIFF", compression="tiff_deflate"),
    "cmyk.tif": lambda: saved(picture("CMYK"), "TIFF"),
    "lab.tif": lambda: saved(picture("LAB"), "TIFF"),
    "ycbcr-jpeg.tif": lambda: saved(picture("YCbCr"), "TIFF", compression="jpeg"),
    "pages.tif": lambda: saved(picture(), "TIFF", **frames()),
    "orientation-3.tif": lambda: saved(ImageOps.mirror(picture()), "TIFF", tiffinfo={ORIENTATION: 3}),
    "big.tif": lambda: saved(picture(), "TIFF", big_tiff=True),
    # others
    "rgb.bmp": lambda: saved(picture(), "BMP"),
    "bilevel.bmp": lambda: saved(picture("1"), "BMP"),
    "downwards.bmp": bottom_up_bmp,
    "lossy.webp": lambda: saved(picture(), "WEBP"),
    "lossless-transparent.webp": lambda: saved(half_transparent(), "WEBP", lossless=True),
    "animated.webp": lambda: saved(picture(), "WEBP", **frames()),
    "rgb.avif": lambda: saved(picture(), "AVIF"),
    "rgb.jp2": lambda: saved(picture(), "JPEG2000"),
    "gray-16-bit.jp2": lambda: saved(Image.fromarray(levels(4000, 60000, np.uint16)), "JPEG2000"),
    "rgba.ico": lambda: saved(picture("RGBA", (64, 64)), "ICO"),
    "pointer.cur": cursor,
    "rgba.icns": lambda: saved(picture("RGBA", (32, 32)), "ICNS"),
    "rgb.pcx": lambda: saved(picture(), "PCX"),
    "bilevel.pcx": lambda: saved(picture("1"), "PCX"),
    "rle.tga": lambda: saved(picture("RGBA"), "TGA", compression="tga_rle"),
    "rgb.sgi": lambda: saved(picture(), "SGI"),
    "bilevel.msp": lambda: saved(picture("1"), "MSP"),
    "bilevel.xbm": lambda: saved(picture("1"), "XBM"),
    "text.xpm": xpm,
    "text.pbm": lambda: netpbm(b"P1", levels(1, 0, int), 1),
    "text.pgm": lambda: netpbm(b"P2", levels(2, 14, int), 15),
    "text.ppm": lambda: netpbm(b"P3", np.asarray(picture()).reshape(HEIGHT, -1, 3), 255),
    "16-bit.pgm": lambda: b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + levels(4000, 60000, ">u2").tobytes(),
    "float.pfm": lambda: b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + levels(0.1, 0.9, "<f4").tobytes(),
    "micrograph.spi": spider,
    "telescope.fits": fits,
    "rgba.dds": lambda: saved(picture("RGBA"), "DDS"),
    "palette.blp": lambda: saved(picture("P"), "BLP"),
    "rgb.qoi": lambda: saved(picture(), "QOI"),
    "gray.ras": sun_raster,
    "rgb.dib": lambda: saved(picture(), "DIB"),
}

# Readable too, and neither dark nor bright anywhere in particular.
PLAIN: dict[str, Callable[[], bytes]] = {
    "adobe-transform-2.jpg": adobe_transformed,
    "one-pixel.png": lambda: saved(Image.new("RGB", (1, 1)), "PNG"),
    "one-pixel.jpg": lambda: saved(Image.new("L", (1, 1)), "JPEG"),
    "one-pixel.gif": lambda: saved(Image.new("1", (1, 1)), "GIF"),
    "tall.png": lambda: saved(Image.new("L", (1, 20000)), "PNG"),
    "tall.jpg": lambda: saved(Image.new("RGB", (1, 20000)), "JPEG"),
    "constant-float.tif": lambda: tiff_of(np.full((4, 5), 77.5, np.float32)),
    "no-number.tif": lambda: tiff_of(np.full((4, 5), np.nan, np.float32)),
}


def bomb_png(width: int, height: int) -> bytes:
    """Return a PNG of a bit a pixel, a thousandth of what it decodes to."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    rows = [squeeze.compress(row * 1000) for _ in range(height // 1000)]
    return png_of(png_head(width, height, 1, 0), (b"IDAT", b"".join(rows) + squeeze.flush()), END)


def claims(kind: str, at: int, layout: str, *values: int, mode: str = "RGB") -> bytes:
    """Return a file whose header claims something else, from byte `at`."""
    data = bytearray(saved(picture(mode), kind))
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


def giant_jpeg() -> bytes:
    data = bytearray(saved(picture(), "JPEG"))
    at = data.find(b"\xff\xc0")  # start of frame
    struct.pack_into(">HH", data, at + 5, 65500, 65500)
    return bytes(data)


def giant_webp() -> bytes:
    """Return an extended WebP whose canvas is claimed to have 16383 pixels a side."""
    data = bytearray(saved(picture(), "WEBP", **frames()))
    at = data.find(b"VP8X") + 12
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


def tiff_that_points_at_itself() -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8)


def cut(kind: str, share: float, mode: str = "RGB", **options: Any) -> bytes:
    """Return the beginning of a file of something that does not compress."""
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).convert(mode), kind, **options)
    return data[: int(share * len(data))]


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "one-byte.png": lambda: b"\x89",
    "text.jpg": lambda: b"This is no image.",
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "drawing.png": lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "archive.jpg": lambda: b"PK\x03\x04" + bytes(200),
    "document.jpg": lambda: b"%PDF-1.7\n" + bytes(200),
    "zeros.jpg": lambda: bytes(5000),
    "beginning.jpg": lambda: b"\xff\xd8\xff",
    **{f"cut-{n}.jpg": lambda n=n: cut("JPEG", n / 100) for n in (5, 50, 95)},  # type: ignore[misc]
    "cut-progressive.jpg": lambda: cut("JPEG", 0.5, progressive=True),
    **{f"cut-{n}.png": lambda n=n: cut("PNG", n / 100) for n in (5, 50, 95)},  # type: ignore[misc]
    "cut.gif": lambda: cut("GIF", 0.9),
    "cut.webp": lambda: cut("WEBP", 0.5),
    "cut.bmp": lambda: cut("BMP", 0.5),
    "cut.tif": lambda: cut("TIFF", 0.5),
    "cut-lzw.tif": lambda: cut("TIFF", 0.5, compression="tiff_lzw"),
    "cut.jp2": lambda: cut("JPEG2000", 0.5),
    "cut.ppm": lambda: cut("PPM", 0.5),
    "cut.ico": lambda: cut("ICO", 0.5, "RGBA"),
    "cut.sgi": lambda: cut("SGI", 0.2),
    "checksum.png": lambda: saved(picture(), "PNG").replace(b"IHDR", b"IHDr"),
    "damaged-pixels.png": lambda: png_of(png_head(WIDTH, HEIGHT), (b"IDAT", b"\x78\x9c" + b"\xaa" * 500), END),
    "no-pixels.png": lambda: png_of(png_head(WIDTH, HEIGHT), END),
    "no-size.png": lambda: png_of(png_head(0, 0), (b"IDAT", zlib.compress(b"")), END),
    "no-size.bmp": lambda: claims("BMP", 18, "<ii", 0, 0),
    "text-bomb.png": lambda: png_of(
        png_head(WIDTH, HEIGHT),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))),
        png_pixels(np.asarray(picture()).reshape(HEIGHT, -1)),
        END,
    ),
    "itself.tif": tiff_that_points_at_itself,
    "weather.bufr": lambda: b"BUFR" + bytes(100),
    "weather.grib": lambda: b"GRIB" + bytes(3) + b"\x01" + bytes(100),
    "data.h5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
}

# Refused for the number of their pixels, before they are decoded.
TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "100-megapixels.png": lambda: bomb_png(10_000, 10_000),
    "170-megapixels.png": lambda: bomb_png(17_000, 10_000),
    "900-megapixels.png": lambda: bomb_png(30_000, 30_000),
    "giant.jpg": giant_jpeg,
    "giant.gif": lambda: claims("GIF", 6, "<HH", 65535, 65535, mode="P"),
    "giant.bmp": lambda: claims("BMP", 18, "<ii", 40_000, 40_000),
    "giant.tga": lambda: claims("TGA", 12, "<HH", 65535, 65535),
    "giant.ppm": lambda: b"P6 50000 50000 255\n" + bytes(1000),
    "giant.webp": giant_webp,
}


@cache
def files() -> dict[str, bytes]:
    """Return all files by their names."""
    return {name: make() for kind in (READABLE, PLAIN, BROKEN, TOO_LARGE) for name, make in kind.items()}


def damaged(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield every readable small file cut off somewhere, or with some of its bytes changed."""
    generator = np.random.default_rng(seed)
    for name in READABLE:
        data = bytearray(files()[name])
        if generator.random() < 0.3:
            yield name, bytes(data[: generator.integers(len(data))])
            continue
        for _ in range(generator.integers(1, 8)):
            # Most of what decoders stumble over is in the first bytes.
            most = len(data) if generator.random() < 0.5 else min(len(data), 200)
            data[generator.integers(most)] = generator.integers(256)
        yield name, bytes(data)
