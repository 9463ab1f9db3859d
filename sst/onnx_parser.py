"""A parser without PyTorch: what `python predict.py RUN_DIR --export parser.onnx` wrote, run by onnxruntime.

This file needs numpy, Pillow and onnxruntime alone, and nothing else of this package: it can be copied out.
(For masks by name copy expression.py too.)

    from sst.onnx_parser import OnnxParser
    parser = OnnxParser("parser.onnx")
    masks = parser("photo.jpg")          # {domain: (h, w) uint8 class ids}, as sst.load gives them
"""

import json

import numpy as np
from PIL import Image, ImageOps

STRIP = 2 ** 20  # logits held at the photo's own size at a time


class OnnxParser:
    """A parser from an ONNX file, with the interface of sst.inference.Parser.

    size: (H, W) that photos are fitted into. max_side: their own size instead, shrunk to at most so many
    pixels. With neither it is what the file says. threads: 0 for as many as onnxruntime likes. Raises
    ValueError for a file without what `--export` writes, ImportError without onnxruntime.
    """

    def __init__(self, path, size=None, max_side=None, threads=0):
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("OnnxParser needs the package onnxruntime; run: pip install "
                              "onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            said = self.session.get_modelmeta().custom_metadata_map
            self.classes, self.colours, self.photos = (
                json.loads(said[key]) for key in ("classes", "colours", "photos"))
        except Exception as error:
            raise ValueError(f"{path}: not a parser ({' '.join(str(error).split())[:200]}); give a file that "
                             "predict.py --export of this version wrote") from None
        if max_side is not None and not (isinstance(max_side, int) and max_side > 0):
            raise ValueError(f"max_side is {max_side!r}; it must be a number of pixels, 1 or more")
        self.size = size or (None if max_side else self.photos["size"])
        self.max_side = max_side or 1024

    def __call__(self, images, domains=None, probabilities=False):
        """A path, a PIL image or an array (h, w, 3) uint8 RGB -> {domain: (h, w) uint8}; of a list, a list.

        domains: names, for some only. probabilities: (Z, h, w) float32 instead. Raises ValueError.
        """
        if isinstance(images, (list, tuple)):
            return [self(image, domains, probabilities) for image in images]
        unknown = [name for name in domains or () if name not in self.classes]
        if unknown:
            raise ValueError(f"domains: '{unknown[0]}' is none of {', '.join(self.classes)}")
        image = pixels(images)
        h, w = image.shape[:2]
        canvas, (top, left, height, width) = self.on_canvas(image)
        x = canvas.transpose(2, 0, 1)[None].astype(np.float32) / 255
        names = list(domains or self.classes)
        found = {}
        for name, A in zip(names, self.session.run(names, {"image": x})):
            A = A[0, :, top:top + height, left:left + width]
            found[name] = softmax(resized(A, h, w)) if probabilities else label_map(A, h, w)
        return found

    def on_canvas(self, image):
        """The canvas that the network sees, (H, W, 3) uint8, and the photo's box on it."""
        h, w = image.shape[:2]
        if self.size is None:
            scale = min(1, self.max_side / max(h, w))
            H, W = max(1, round(h * scale)), max(1, round(w * scale))
        else:
            H, W = self.size
        scale = min(H / h, W / w)
        height, width = max(1, min(H, round(h * scale))), max(1, min(W, round(w * scale)))
        top, left = (H - height) // 2, (W - width) // 2
        canvas = np.empty((H, W, 3), np.uint8)
        canvas[:] = self.photos["padding"]
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        canvas[top:top + height, left:left + width] = np.asarray(small)
        return canvas, (top, left, height, width)

    def mask(self, image, text):
        """The pixels that an expression means, (h, w) bool: "ccp-fine: dress, skirt"; see expression.py."""
        try:
            from . import expression
        except ImportError:  # both files were copied out
            import expression
        masks = image if isinstance(image, dict) else self(image)
        return expression.evaluate(text, masks, self.classes)

    def legend(self):
        """{domain: [(class name, id, (r, g, b)), ...]}."""
        return {name: [(c, k, tuple(self.colours[name][k])) for k, c in enumerate(classes)]
                for name, classes in self.classes.items()}


def pixels(image):
    """A path, PIL image or array -> (h, w, 3) uint8 RGB, turned upright as EXIF says; raises ValueError."""
    if not isinstance(image, (np.ndarray, Image.Image)):
        try:
            image = Image.open(image)
            image.load()
        except Exception as error:
            raise ValueError(f"{image}: not a readable photo ({' '.join(str(error).split())})") from None
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"an image array of shape {image.shape}, {image.dtype}; give (h, w, 3) uint8 RGB")
    return image


def resized(A, h, w):
    """Logits (Z, H, W) -> (Z, h, w), bilinear."""
    left, right, t = between(w, A.shape[2])
    above, below, s = between(h, A.shape[1])
    rows = A[:, above] + s[:, None] * (A[:, below] - A[:, above])  # (Z, h, W)
    return rows[..., left] + t * (rows[..., right] - rows[..., left])


def label_map(A, h, w):
    """Logits (Z, H, W) -> (h, w) uint8: the argmax of `resized`.

    A pixel's logits are a weighted mean of those of the four around it. Where all four have the same class,
    so has the pixel; only the others are worked out. Strips of rows bound the memory.
    """
    Z, H, W = A.shape
    highest, flat = A.argmax(0).astype(np.uint8).ravel(), A.reshape(Z, -1)
    left, right, t = between(w, W)
    label, rows = np.empty((h, w), np.uint8), max(1, STRIP // (4 * w))
    for top in range(0, h, rows):
        above, below, s = (v[top:top + rows, None] for v in between(h, H))
        corners = [y * W + x for y in (above, below) for x in (left, right)]  # (rows, w) places in H*W
        found = [highest[place] for place in corners]
        label[top:top + rows] = found[0]
        mixed = (found[1] != found[0]) | (found[2] != found[0]) | (found[3] != found[0])
        y, x = np.nonzero(mixed)
        for some in range(0, len(y), max(1, STRIP // Z)):
            u, v = y[some:some + STRIP // Z], x[some:some + STRIP // Z]
            four = [flat[:, place[u, v]] for place in corners]  # (Z, n) each
            upper, lower = four[0] + t[v] * (four[1] - four[0]), four[2] + t[v] * (four[3] - four[2])
            label[top + u, v] = (upper + s[u, 0] * (lower - upper)).argmax(0)
    return label


def between(n, N):
    """Where n pixels lie among N: the one before, the one after, and the way between them, 0 to 1."""
    place = ((np.arange(n) + 0.5) * (N / n) - 0.5).clip(0)
    before = place.astype(np.int64)
    return before, (before + 1).clip(max=N - 1), (place - before).astype(np.float32)


def softmax(A):
    p = np.exp(A - A.max(0))
    return p / p.sum(0)
