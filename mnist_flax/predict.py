"""Classifies image files with a trained network: python -m mnist_flax.predict RUN_DIR IMAGE..."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mnist_flax import cli, trained
from mnist_flax.errors import UserError

# Not what Pillow has another program draw, such as EPS.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def main() -> None:
    parser = cli.run_parser("mnist_flax.predict", __doc__)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files of any size")
    parser.add_argument(
        "--invert",
        action="store_true",
        help="for dark ink on light paper: the networks were trained on light digits on black",
    )
    args = parser.parse_args()
    run = trained.load(args.run_dir, args.step, args.seed)
    pixels = np.stack([read(Path(p), run.image_shape, args.invert) for p in args.images])
    for path, probabilities in zip(args.images, run.predict(pixels), strict=True):
        best = int(probabilities.argmax())
        print(f"{path}: class {best} ({probabilities[best]:.1%})")


def read(path: Path, shape: tuple[int, int, int], invert: bool) -> np.ndarray:
    """An image file as uint8 [H, W, C], resized to `shape`.

    It is turned as its EXIF data say. What is transparent is black, or with `invert` the white
    paper.

    Raises:
        UserError: the file is not there or is no single image of 8 or 16 bits, or `shape` has
            neither 1 nor 3 channels.
    """
    if shape[2] not in (1, 3):
        raise UserError(f"image files have 1 or 3 channels, and the network takes {shape[2]}")
    try:
        image = Image.open(path, formats=_FORMATS)
        # A camera's JPEG may hold a small copy of the picture, too.
        if (pictures := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            raise UserError(f"it has {pictures} pictures")
        # Of a PGM they come as 32.
        has_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        image = ImageOps.exif_transpose(image)
        if has_16_bits:
            wide = np.asarray(image)
            # The value that stands for nothing, where one does.
            nothing = wide == image.info.get("transparency", -1)
            pixels = np.where(nothing, 255 if invert else 0, wide >> 8)
            image = Image.fromarray(pixels.astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise UserError("it has pixels of 32 bits")
        elif image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white" if invert else "black")
            image = Image.alpha_composite(paper, image.convert("RGBA"))
        image = image.convert("L" if shape[2] == 1 else "RGB")
    except Exception as error:
        # Pillow raises whatever the damage leads to, SyntaxError among it.
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be read as an image ({reason}): give a PNG or JPEG of 8 or 16 bits"
        ) from None
    image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.invert(image) if invert else image).reshape(shape)


if __name__ == "__main__":
    cli.run(main)
