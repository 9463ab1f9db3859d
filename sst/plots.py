"""Pictures: label maps in colour with their legend, curves, matrices, and the graph of a body. matplotlib is imported where a picture
is drawn."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .domains import IGNORE

GREY = (128, 128, 128)  # of ignored pixels
SOFTWARE = "sst evaluate.py"  # what a picture of a confusion matrix says of itself


def colour_table(domain):
    """(256, 3) uint8: the domain's palette by class id; ids that are none, and ignored pixels, are grey."""
    table = np.full((256, 3), GREY, np.uint8)
    table[:domain.num_classes] = domain.palette()
    table[IGNORE] = GREY
    return table


def colourise(label, domain):
    """(H, W) class ids -> (H, W, 3) uint8 in the domain's colours; ignored pixels are grey."""
    return colour_table(domain)[label]


def indexed(label, domain):
    """(H, W) class ids -> a PIL image that keeps them as palette indices, to be saved as PNG."""
    image = Image.fromarray(label)
    image.putpalette(colour_table(domain).tobytes())
    return image


def scaled(image, labels, side):
    """A photo (H, W, 3) and its label maps {domain: (H, W)}, resized for a picture with `side` pixels on the longer side."""
    size = [max(1, round(n * side / max(image.shape))) for n in (image.shape[1], image.shape[0])]
    resize = lambda pixels, how: np.asarray(Image.fromarray(pixels).resize(size, how))
    return (resize(image, Image.Resampling.BILINEAR),
            {name: resize(label, Image.Resampling.NEAREST) for name, label in labels.items()})


def overlay(image, label, domain):
    """The photo under the colours of its classes, and their names on the right: (H', W', 3) uint8.

    The background stays as it is. A class's pixels keep their brightness alone, so that its colour is the legend's. Names of
    classes that the label map lacks are grey.
    """
    from matplotlib import get_data_path
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)  # knows more scripts than Pillow's own
    brightness = image.mean(axis=2, keepdims=True)
    blend = np.where(label[..., None] > 0, 0.4 * brightness + 0.6 * colourise(label, domain), image).astype(np.uint8)
    line = 18
    width = 40 + round(max(font.getlength(name) for name in (domain.name, *domain.classes)))
    legend = Image.new("RGB", (width, max(len(image), line * domain.num_classes + 14)), "white")
    draw = ImageDraw.Draw(legend)
    draw.text((10, 7), domain.name, "black", font)
    present = set(np.unique(label).tolist())
    for i, (name, colour) in enumerate(zip(domain.classes, domain.palette().tolist())):
        if i > 0:
            top = line * i + 7
            draw.rectangle((10, top + 2, 23, top + 14), tuple(colour), (128, 128, 128))
            draw.text((30, top), name, "black" if i in present else (170, 170, 170), font)
    return side_by_side([blend, np.asarray(legend)])


def side_by_side(pictures):
    """[(H, W, 3), ...] uint8 in one row, at the top of white ground."""
    canvas = np.full((max(map(len, pictures)), sum(p.shape[1] for p in pictures), 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        canvas[:len(picture), left:left + picture.shape[1]] = picture
        left += picture.shape[1]
    return canvas


def rendered(figure):
    """A matplotlib Figure -> a PIL image, which a notebook shows as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def panel(pictures, titles, domains=None, columns=None, width=2.0):
    """Pictures side by side with a title each, as a PIL image.

    pictures: (H, W, 3) uint8, or (H, W) class ids where the same place of `domains` holds their LabelDomain: those are coloured, and
    the names of their classes stand below. columns: pictures a row. width: of a picture, in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    domains = domains or [None] * len(pictures)
    columns = min(columns or len(pictures), len(pictures))
    rows = -(-len(pictures) // columns)
    present = [np.setdiff1d(np.unique(picture), (0, IGNORE)) if domain else () for picture, domain in zip(pictures, domains)]
    tall = width * max(picture.shape[0] / picture.shape[1] for picture in pictures)
    names = 0.14 * max((len(ids) + 1) // 2 for ids in present)  # inches below a picture
    row = 0.28 + tall + (names and names + 0.15)
    size = (width + 0.08) * columns, row * rows + 0.05
    figure = Figure(figsize=size, dpi=100)
    for k, (picture, title, domain, ids) in enumerate(zip(pictures, titles, domains, present)):
        left, top = (width + 0.08) * (k % columns) + 0.04, size[1] - row * (k // columns) - 0.28
        axis = figure.add_axes((left / size[0], (top - tall) / size[1], width / size[0], tall / size[1]))
        axis.imshow(colourise(picture, domain) if domain else picture, interpolation="nearest")
        axis.axis("off")
        axis.set_title(title, fontsize=9, pad=3)
        if domain:
            patches = [Patch(facecolor=domain.palette()[i] / 255, edgecolor="0.5", linewidth=0.4, label=domain.classes[i]) for i in ids]
            axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7, frameon=False, handlelength=1,
                        labelspacing=0.3, columnspacing=0.8, borderaxespad=0.3)
    return rendered(figure)


def shade(values, low=None, high=None, cmap="viridis"):
    """(H, W) numbers -> (H, W, 3) uint8 colours between `low` and `high` (the smallest and largest number)."""
    from matplotlib import colormaps
    values = np.asarray(values, np.float64)
    low, high = values.min() if low is None else low, values.max() if high is None else high
    return (255 * colormaps[cmap](np.clip((values - low) / max(high - low, 1e-12), 0, 1))[..., :3]).round().astype(np.uint8)


def draw_matrix(axis, values, rows, columns, form="{:.0f}", cmap="Blues", low=None, high=None, least=-np.inf):
    """A matrix on a matplotlib axis: a colour and a number for every entry, its row's and its column's name beside it.

    form: of the numbers. Entries below `least` get none.
    """
    low, high = np.min(values) if low is None else low, np.max(values) if high is None else high
    picture = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    for r, c in np.argwhere(np.asarray(values) >= least):
        ink = "white" if is_dark(picture.cmap(picture.norm(values[r, c]))) else "black"
        axis.text(c, r, form.format(values[r, c]), ha="center", va="center", fontsize=6, color=ink)


def matrices(values, titles, rows, columns, width=None, **how):
    """Heat maps side by side, as a PIL image. values: matrices (R, C); rows, columns: their names, R and C; how: of `draw_matrix`."""
    from matplotlib.figure import Figure
    n = len(values)
    size = (width or n * (0.3 * len(columns) + 0.5) + 0.07 * max(map(len, rows)), 0.22 * len(rows) + 0.07 * max(map(len, columns)) + 0.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    for k, (axis, matrix, title) in enumerate(zip(figure.subplots(1, n, squeeze=False)[0], values, titles)):
        draw_matrix(axis, np.asarray(matrix), rows if k == 0 else [""] * len(rows), columns, **how)
        axis.set_title(title, fontsize=9)
    return rendered(figure)


def place_of(region):
    """x, y of a region (H, W) of booleans: its mean where that lies in the region, else the pixel next to the mean of its larger half,
    left or right, so that the place of two arms is on an arm."""
    y, x = np.nonzero(region)
    mean = np.array([x.mean(), y.mean()])
    if not region[tuple(mean.round().astype(int)[::-1])]:
        half = x > mean[0]
        half = half if half.mean() >= 0.5 else ~half
        x, y = x[half], y[half]
        nearest = np.hypot(x - x.mean(), y - y.mean()).argmin()
        mean = np.array([x[nearest], y[nearest]])
    return mean


def class_places(label, others, Z):
    """(Z, 2): where each class is on the body, as x, y in pixels of a label map (H, W); NaN where no map has it.

    The place of a class that `label` lacks is its mean place in the label maps `others`; in each, places are measured between the top
    and the bottom, the left and the right end of the foreground.
    """
    def places(label):
        y, x = np.nonzero((label > 0) & (label != IGNORE))
        corner, size = np.array([x.min(), y.min()]), np.array([np.ptp(x) + 1, np.ptp(y) + 1])
        present = [z for z in range(Z) if (label == z).any()]
        result = np.full((Z, 2), np.nan)
        result[present] = [(place_of(label == z) - corner) / size for z in present]
        return result, corner, size
    own, corner, size = places(label)
    found = np.stack([places(other)[0] for other in others if ((other > 0) & (other != IGNORE)).any()] + [own])
    seen = ~np.isnan(found[..., 0])
    mean = np.nansum(found, axis=0) / np.where(seen.any(0), seen.sum(0), np.nan)[:, None]
    return np.where(np.isnan(own), mean, own) * size + corner


def body_graph(samples, width=4.0):
    """M_intra drawn on the body, one picture per domain side by side, as a PIL image: a name for every class but the background, at
    its place, and a line between two that touch. What has to do with a class that the picture lacks is grey; a class without a place in
    any label map is left out.

    samples: [(domain, image (H, W, 3), label map (H, W), label maps of others that show where the other classes are), ...].
    """
    from matplotlib.figure import Figure
    tall = max(image.shape[0] / image.shape[1] for _, image, _, _ in samples)
    figure = Figure(figsize=(width * len(samples), 0.98 * width * tall + 0.32), dpi=100, layout="constrained")
    for axis, (domain, image, label, others) in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples):
        h, w = label.shape
        axis.imshow(0.35 * image.mean(-1) + 0.65 * 255, cmap="gray", vmin=0, vmax=255, extent=(0, w, h, 0))
        axis.axis("off")
        axis.set_title(domain.name, fontsize=10)
        mask, palette = domain.intra_mask().numpy(), domain.palette() / 255
        there = np.isin(np.arange(domain.num_classes), label)
        place = class_places(label, others, domain.num_classes)
        known = [z for z in range(1, domain.num_classes) if not np.isnan(place[z]).any()]
        place[known] = apart(place[known], gap=(0.22 * w, 0.07 * h), size=(w, h))
        for a, b in [(a, b) for a in known for b in known if a < b and mask[a, b]]:
            strong = there[a] and there[b]
            axis.plot(*zip(place[a], place[b]), color="0.1" if strong else "0.45", linewidth=1.1 if strong else 0.6,
                      linestyle="-" if strong else ":", zorder=2 if strong else 1)
        for z in known:
            ink = "0.45" if not there[z] else "white" if is_dark(palette[z]) else "black"
            axis.text(*place[z], domain.classes[z], ha="center", va="center", fontsize=7, color=ink, zorder=3 + there[z],
                      bbox=dict(boxstyle="round,pad=0.2", linewidth=0.6, edgecolor="0.2" if there[z] else "0.6",
                                facecolor=palette[z] if there[z] else "0.95"))
    return rendered(figure)


def apart(points, gap, size):
    """Points (n, 2) moved so that they are `gap` (x, y) apart, as an ellipse, if they can within `size` (w, h), and little otherwise."""
    gap, size = np.asarray(gap, np.float64), np.asarray(size, np.float64)
    rank = np.argsort(np.argsort(points[:, 1], kind="stable"))
    side = np.where(rank % 2, 0.2, -0.2) + 0.01 * rank
    start = points = points + np.stack([side * gap[0], 0 * side], -1)  # a column of points gives way to both sides
    for _ in range(300):
        difference = (points[:, None] - points[None]) / gap  # (n, n, 2)
        distance = np.linalg.norm(difference, axis=-1, keepdims=True)
        push = np.maximum(1 - distance, 0) * difference / np.maximum(distance, 1e-9)
        points = points + 0.3 * gap * push.sum(1) + 0.02 * (start - points)
        points = np.clip(points, gap * (0.4, 0.3), size - gap * (0.4, 0.3))
    return points


def is_dark(rgb):
    """Whether white letters are read better than black ones on a colour, r, g, b in 0..1."""
    return np.dot(rgb[:3], (0.3, 0.6, 0.1)) < 0.5


def save_samples(samples, path):
    """One row of pictures per domain: photo, truth, prediction, for each of its samples, and the legend of class names.

    samples: [(domain, [(image (H, W, 3), truth (H, W), prediction (H, W)), ...]), ...].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    shown = max(len(triples) for _, triples in samples)
    tall = np.mean([image.shape[0] / image.shape[1] for _, triples in samples for image, _, _ in triples])
    legend = 3.2  # inches for the names
    figure = Figure(figsize=(1.35 * 3 * shown + legend, sum(max(1.35 * tall + 0.35, 0.17 * (d.num_classes + 1) / 2 + 0.3)
                                                        for d, _ in samples)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(samples), 3 * shown + 1, squeeze=False, width_ratios=[1.35] * 3 * shown + [legend])
    for axes, (domain, triples) in zip(rows, samples):
        for axis in axes:
            axis.axis("off")
        for k, (image, truth, prediction) in enumerate(triples):
            pictures = (image, colourise(truth, domain), colourise(prediction, domain))
            for axis, picture, title in zip(axes[3 * k:], pictures, ("photo", "truth", "prediction")):
                axis.imshow(picture, interpolation="nearest")
                axis.set_title(title, fontsize=8)
        palette = domain.palette() / 255
        patches = [Patch(facecolor=colour, edgecolor="0.5", linewidth=0.4, label=name) for colour, name in zip(palette, domain.classes)]
        axes[-1].legend(handles=patches, loc="center left", ncols=1 if domain.num_classes <= 9 else 2, fontsize=7, frameon=False,
                        title=domain.name, title_fontsize=8, handlelength=1.2, labelspacing=0.3, columnspacing=1)
    figure.savefig(path)


def save_curves(lines, path):
    """Losses and validation mIoU over steps. lines: the objects of log.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    train, val = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val"))
    figure = Figure(figsize=(13, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name in train[0]["loss"] if train else ():
        left.plot([line["step"] for line in train], smooth([line["loss"][name] for line in train]), label=name, linewidth=1)
    left.set(title="training losses (smoothed)", xlabel="step", yscale="log")
    for name in train[0]["cos"] if train else ():
        for key, style in (("x0", "-"), ("xl", "--"))[:len(train[0]["cos"][name])]:
            middle.plot([line["step"] for line in train], [line["cos"][name][key] for line in train], style, linewidth=1,
                        label=f"{name} {'X_0' if key == 'x0' else 'X_L'}")
    middle.set(title="mean cosine between the rows of X (1: collapsed)", xlabel="step", ylim=(-0.3, 1.05))
    for name in val[0]["miou"] if val else ():
        right.plot([line["step"] for line in val], [line["miou"][name] for line in val], "o-", label=name, linewidth=1, markersize=3)
    right.set(title="validation mIoU, %", xlabel="step")
    for axis in (left, middle, right):
        if axis.lines:
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "none in this run", ha="center", transform=axis.transAxes, color="0.5")
        axis.grid(alpha=0.3)
    figure.savefig(path)


def save_confusion(matrix, truth, predicted, title, path):
    """A confusion matrix (Z, P) as a picture: of each true class, the percentages that were predicted as each class.

    truth, predicted: names of the Z rows and P columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(0.34 * len(predicted) + 2.6, 0.3 * len(truth) + 2.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = [name if row.any() else f"{name} (in no label)" for name, row in zip(truth, matrix)]
    draw_matrix(axis, share, names, predicted, low=0, high=100, least=0.5)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="predicted, % of the true class's pixels", ylabel="true class")
    figure.savefig(path, format="png", metadata={"Software": SOFTWARE})


def is_confusion(path):
    """Whether a file is a picture that `save_confusion` wrote."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def smooth(values, window=9):
    """Running mean over the last `window` values."""
    return [float(np.mean(values[max(0, i + 1 - window):i + 1])) for i in range(len(values))]


def sampling_points(image, chosen, reference, locations, weights):
    """Where queries of deformable attention look: one picture of the photo for each, as a PIL image.

    image (H, W, 3) uint8; chosen {title: q}; reference (Q, 2), locations (Q, M, L, P, 2), weights (Q, M, L, P) as `deform_attn` takes
    them. A level has a colour, a head a marker, a weight an area; the white cross is the query. What lies outside the photo reads
    zeros; what lies far outside is not drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(2.5 * len(chosen) + 1, 2.85), dpi=110, layout="constrained")
    *axes, key = figure.subplots(1, len(chosen) + 1, squeeze=False, width_ratios=[2.5] * len(chosen) + [1])[0]
    H, W = image.shape[:2]
    colours, markers, (_, M, L, _) = ("#ffb000", "#dc267f", "#648fff", "#009e73"), "o^sDvP*X", weights.shape
    for axis, (title, q) in zip(axes, chosen.items()):
        axis.imshow(image, extent=(0, W, H, 0), interpolation="nearest")
        for m in range(M):
            for l in range(L):
                x, y = (np.asarray(locations[q, m, l]) * (W, H)).T
                axis.scatter(x, y, s=6 + 400 * np.asarray(weights[q, m, l]), c=colours[l % 4], marker=markers[m % 8], edgecolor="black",
                             linewidth=0.5, alpha=0.85)
        axis.plot(*(np.asarray(reference[q]) * (W, H)), "+", color="white", markersize=11, markeredgewidth=2)
        axis.set(xlim=(-0.3 * W, 1.3 * W), ylim=(1.3 * H, -0.3 * H), xticks=[], yticks=[], facecolor="0.85")
        axis.set_title(title, fontsize=9)
    dots = [Line2D([], [], linestyle="", marker="o", color=colours[l % 4], label=f"level {l + 1}") for l in range(L)]
    dots += [Line2D([], [], linestyle="", marker=markers[m % 8], color="0.4", label=f"head {m + 1}") for m in range(M)]
    key.legend(handles=dots, loc="center left", fontsize=8, frameon=False)
    key.axis("off")
    return rendered(figure)


def heat_map(matrix, title, xlabel="", ylabel="", lines=(), path=None):
    """A matrix as a picture, dark where it is large; a PIL image.

    lines: rows and columns before which a line is drawn, such as the first of each level. path: (n, 2) places x, y drawn over it.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.2, 4.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(np.asarray(matrix), cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=axis, shrink=0.8)
    for n in lines:
        axis.axhline(n - 0.5, color="0.5", linewidth=0.6)
        axis.axvline(n - 0.5, color="0.5", linewidth=0.6)
    if path is not None:
        axis.plot(*np.asarray(path).T, ".-", color="#dc267f", linewidth=1, markersize=4)
        axis.plot(*np.asarray(path)[-1], "o", color="#dc267f", markersize=8, markeredgecolor="black")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return rendered(figure)


def timings(x, times, xlabel):
    """Times over sizes, both logarithmic: a line through the medians, a bar from the fastest turn to the slowest; a PIL image.

    times: {name: (len(x), turns) seconds}.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.6, 3.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    for (name, turns), colour in zip(times.items(), ("#648fff", "#fe6100", "#555555", "#dc267f")):
        turns = 1000 * np.asarray(turns)
        middle = np.median(turns, axis=1)
        axis.errorbar(x, middle, [middle - turns.min(1), turns.max(1) - middle], fmt="o-", color=colour, label=name, capsize=3, markersize=4)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="milliseconds")
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return rendered(figure)
