"""Pixels of image files and arrays, as 8-bit intensities of the size and the colours that are asked for.
Whatever is reinterpreted on the way is counted (Found).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# What a file holds → 8 bits

@dataclass
class Found:
    """What was found in files: the ranges of values, by the highest value of their type (None for a type
    without one), and how many images of each kind a line is said about.

    untyped: the value range to take for numbers whose type has none
    """
    untyped: tuple | None = None
    ranges: dict = field(default_factory=dict)
    kinds: Counter = field(default_factory=Counter)

    def look(self, values, top):
        """Remember the range of an array's values; NaN does not count."""
        if values.dtype.kind == "f":
            values = values[~np.isnan(values)]
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        before = self.ranges.get(top, (low, high))
        self.ranges[top] = min(low, before[0]), max(high, before[1])

    def lines(self, value_range, trained=False):
        """What is said of these images. trained: whether they are for a trained model, where no option of
        train.py can help
        """
        keep = "" if trained else " (--image_size HEIGHT WIDTH in their ratio keeps all)"
        lines = [f"{count:,} images {LINES[kind]}" + keep * (kind == "cropped")
                 for kind, count in self.kinds.items() if count]
        for top, (low, high) in self.ranges.items():
            if top and value_range and max(value_range) >= 2 * top:
                lines.append(f"images of {8 if top == 255 else 16} bits use only a part of the value range, "
                             f"which ends at {max(value_range):g}; is it meant for them?")
            top = top or self.untyped and self.untyped[1]
            if top and not value_range and (high - low) * 8 < top:
                cut = top == 255 and self.kinds["upper 8 bits"]
                plain = f"its values go from {low:g} to {high:g}"
                lines.append(f"of 0 to {top}, " + (
                    f"{plain}; the model takes 0 for black, {top} for white; if that is wrong, scale them"
                    if trained else plain if cut else range_advice(low, high)))
        return lines

    def add(self, other):
        for top, values in other.ranges.items():
            self.look(np.array(values), top)
        self.kinds.update(other.kinds)


LINES = {
    "frames": "are of several frames or layers, of which only the first is used",
    "pages": "begin a damaged file, whose later pages are left out",
    "transparent": "have transparent parts, which become white; if the fourth band is something else (near "
                   "infrared?), save the other three without it",
    "more bands": "have more bands than can be used, which are left out",
    "not finite": "hold values that are not finite, which become black",
    "upper 8 bits": "are in colour of 16 bits, of which Pillow reads the upper 8; .npy files keep all",
    "clipped": "have values beyond the value range, which are clipped",
    "enlarged": "are smaller than the new size, and are enlarged",
    "cropped": "have another ratio of height to width than the new size; more than a twentieth of each is "
               "cropped away",
    "palette": "have a palette, to whose colours the value range was applied",
    "nearly black": "have no value above 2 of 255; are they of another scale than the rest?",
    "channels first": "are arrays of 3 or 4 x height x width, each taken as one image in colour",
}


class UntypedValues(ValueError):
    """Numbers of a type that does not say which values are black and white"""


def to_bytes(values, value_range, found):
    """Values of any type → uint8 intensities 0 … 255: LOW of the value range becomes 0 and HIGH 255. Without
    a value range uint8 stays as it is, uint16 keeps its upper 8 bits, and other numbers have that of
    found.untyped; if that is None, they raise UntypedValues.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    mask = values.dtype == bool
    if mask:
        values = values.astype(np.uint8) * 255
    top = np.iinfo(values.dtype).max if values.dtype in (np.uint8, np.uint16) else None
    if top is None and not np.isfinite(values).all():
        found.kinds["not finite"] += 1
        values = np.where(np.isfinite(values), values, np.nan)
    found.look(values, top)
    value_range = value_range or (found.untyped if top is None else None)
    if value_range:
        low, high = value_range
        beyond = (values < min(low, high)) | (values > max(low, high))
        found.kinds["clipped"] += bool(beyond.any()) and not mask
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.nan_to_num(scaled.clip(0, 255)).round().astype(np.uint8)
    if top is None:
        raise UntypedValues(f"values of the type {values.dtype}, whose black and white are not known; "
                            "--value_range LOW HIGH names them")
    return values if top == 255 else (values >> 8).astype(np.uint8)


def range_advice(low, high):
    if low == high:
        return f"all its values are {low:g}, so there is nothing to learn"
    return (f"its values go from {low:g} to {high:g}; --value_range {low:g} {high:g} makes the first black "
            "and the last white")


CHANNELS = (1, 3, 4)


def as_stack(array, single):
    """An array of images → [N, H, W] or [N, H, W, C], channels last. Raises ValueError.

    single: whether it may also be one image, [H, W], [H, W, C] or [C, H, W]
    """
    shape = array.shape
    if array.dtype.kind not in "buif":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    one = single and (array.ndim == 2 or array.ndim == 3 and (shape[0] in CHANNELS or shape[2] in CHANNELS))
    stack = array[None] if one else array
    if stack.ndim == 4:
        first, last = stack.shape[1] in CHANNELS, stack.shape[3] in CHANNELS
        if first and last:
            raise ValueError(f"in its shape {'x'.join(map(str, shape))} both the second and the last number "
                             "may be the channels; save it with channels last, and images of at least 8x8")
        if first:
            return np.moveaxis(stack, 1, 3)
        if last:
            return stack
    if stack.ndim == 3 and 0 not in stack.shape[1:] and stack.shape[2] > 4:
        return stack
    raise ValueError(f"its shape is {'x'.join(map(str, shape))}; images are N x height x width, with 1, 3 or "
                     "4 channels last or second (of one image, N is 1)")


def finish_image(pixels, image_size, found):
    """uint8 [H, W] or [H, W, C] → [H, W] or [H, W, 3] of the image size"""
    if pixels.size and 0 < pixels.max() <= 2:
        found.kinds["nearly black"] += 1
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        found.kinds["more bands"] += 1
        pixels = pixels[..., :3]
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if image_size and pixels.shape[:2] != tuple(image_size):
        found.kinds["enlarged"] += pixels.shape[0] < image_size[0] or pixels.shape[1] < image_size[1]
        found.kinds["cropped"] += crops(pixels.shape, image_size)
        from PIL import Image
        pixels = np.asarray(cover(Image.fromarray(np.ascontiguousarray(pixels)), image_size))
    return pixels


def to_array(image, image_size, value_range, found):
    """An open Pillow image → uint8, [H, W] if it is grey, otherwise [H, W, 3]. Turned as its camera says;
    transparent parts are white. Raises some exception if it cannot be read.
    """
    from PIL import Image, ImageOps
    kind = image.format
    if getattr(image, "is_animated", False) and kind not in ("TIFF", "MPO"):  # MPO: a photo and its preview
        found.kinds["frames"] += 1
    # Pillow opens a TIFF of RGB and one more band as RGB
    more_bands = image.mode == "RGBX" or kind == "TIFF" and image.tag_v2.get(277, 1) > len(image.getbands())
    if image.mode in ("LA", "RGB", "RGBA") and ";16" in str(image.tile):
        if value_range:
            raise ValueError("16-bit colour, of which Pillow reads 8 bits; --value_range needs .npy")
        found.kinds["upper 8 bits"] += 1
    unsigned = kind == "TIFF" and image.mode == "I" and image.tag_v2.get(339) == (1,)  # Pillow's I is signed
    white_is_zero = kind == "TIFF" and image.tag_v2.get(262) == 0 and image.mode.startswith("I;16")
    signed = kind == "TIFF" and image.mode == "L" and image.tag_v2.get(339) == (2,)
    image = ImageOps.exif_transpose(image)
    if signed:  # Pillow takes these for unsigned
        return finish_image(to_bytes(np.asarray(image).view(np.int8), value_range, found), image_size, found)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if unsigned:
            values = values.view(np.uint32)
        elif image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):
            # some versions open 16 bits as 32
            values = values.clip(0, 65535).astype(np.uint16)
        if white_is_zero:  # which Pillow heeds in 8 bits only
            values = 65535 - values
        return finish_image(to_bytes(values, value_range, found), image_size, found)
    grey, palette = image.mode in ("1", "L", "LA", "La"), image.mode in ("P", "PA")
    found.kinds["palette"] += palette and value_range is not None
    if more_bands:
        found.kinds["more bands"] += 1
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            found.kinds["transparent"] += 1
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    pixels = finish_image(to_bytes(pixels, value_range, found), image_size, found)
    return pixels[..., 0] if palette and (pixels == pixels[..., :1]).all() else pixels


# ------------------------------------------------------------------------------------------------------------
# Sizes and colours

def grayscale(images, transform):
    """uint8 [N, C, H, W] in NumPy → the luminance (ITU-R BT.601) in one channel, or the same in three."""
    if images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114])
        images = torch.cat([torch.einsum("nchw,c->nhw", part.float(), weights).round().byte()[:, None]
                            for part in torch.from_numpy(images).split(1000)]).numpy()
    return images.repeat(3, axis=1) if transform == "grayscale3" else images


def cover(image, size):
    """A PIL image, scaled to cover (H, W) and cropped at its centre."""
    from PIL import Image, ImageOps
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)


def crops(shape, size):
    """Whether `cover` cuts away more than a twentieth of an image of this shape (H, W, …)."""
    scales = shape[0] / size[0], shape[1] / size[1]
    return min(scales) < 0.95 * max(scales)


def resize(images, size):
    """`cover` for uint8 [N, C, H, W] in NumPy."""
    from PIL import Image
    grey = images.shape[1] == 1
    small = np.stack([np.asarray(cover(Image.fromarray(i[0] if grey else i.transpose(1, 2, 0)), size))
                      for i in images])
    return small[:, None] if grey else np.ascontiguousarray(small.transpose(0, 3, 1, 2))
