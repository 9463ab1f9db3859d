"""Pictures of the programs: label maps in colour with their legend, curves, confusion matrices.

matplotlib is imported where a picture is drawn.
"""

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


def indexed(label, domain, numbers=None):
    """(H, W) class ids -> a PIL image that keeps them as palette indices, to be saved as PNG.

    numbers: (Z,) uint8, other numbers for the classes; classes of one number have the first one's colour.
    """
    table = colour_table(domain)
    if numbers is not None:
        label, colours = numbers[label], table[:len(numbers)]
        table = np.full_like(table, GREY)
        table[numbers[::-1]] = colours[::-1]
    image = Image.fromarray(label)
    image.putpalette(table.tobytes())
    return image


def scaled(image, labels, side):
    """A photo (H, W, 3) and its label maps {domain: (H, W)}, resized to `side` pixels on the longer side."""
    size = [max(1, round(n * side / max(image.shape))) for n in (image.shape[1], image.shape[0])]
    resize = lambda pixels, how: np.asarray(Image.fromarray(pixels).resize(size, how))
    return (resize(image, Image.Resampling.BILINEAR),
            {name: resize(label, Image.Resampling.NEAREST) for name, label in labels.items()})


def font_file():
    """A font that knows more scripts than Pillow's own: matplotlib's."""
    from matplotlib import get_data_path
    return f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def written(name, k):
    """A class name, or its id where the font lacks the script."""
    from matplotlib.ft2font import FT2Font
    font = FT2Font(font_file())
    return name if all(font.get_char_index(ord(letter)) for letter in name) else f"class {k}"


def overlay(image, label, domain):
    """The photo under the colours of its classes, and their names on the right: (H', W', 3) uint8.

    The background stays as it is. A class's pixels keep their brightness alone, so that its colour is the
    legend's. Names of classes that the label map lacks are grey.
    """
    font = ImageFont.truetype(font_file(), 13)
    names = [written(name, k) for k, name in enumerate(domain.classes)]
    brightness = image.mean(axis=2, keepdims=True)
    blend = np.where(label[..., None] > 0, 0.4 * brightness + 0.6 * colourise(label, domain), image)
    line = 18
    width = 40 + round(max(font.getlength(name) for name in (domain.name, *names)))
    legend = Image.new("RGB", (width, max(len(image), line * domain.num_classes + 14)), "white")
    draw = ImageDraw.Draw(legend)
    draw.text((10, 7), domain.name, "black", font)
    present = set(np.unique(label).tolist())
    for i, (name, colour) in enumerate(zip(names, domain.palette().tolist())):
        if i > 0:
            top = line * i + 7
            draw.rectangle((10, top + 2, 23, top + 14), tuple(colour), (128, 128, 128))
            draw.text((30, top), name, "black" if i in present else (170, 170, 170), font)
    return side_by_side([blend.astype(np.uint8), np.asarray(legend)])


def side_by_side(pictures):
    """[(H, W, 3), ...] uint8 in one row, at the top of white ground."""
    canvas = np.full((max(map(len, pictures)), sum(p.shape[1] for p in pictures), 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        canvas[:len(picture), left:left + picture.shape[1]] = picture
        left += picture.shape[1]
    return canvas


def draw_matrix(axis, values, rows, columns, form="{:.0f}", cmap="Blues", low=None, high=None, least=-np.inf):
    """A matrix on a matplotlib axis: a colour and a number for every entry, the names of rows and columns.

    form: of the numbers. Entries below `least` get none.
    """
    low, high = np.min(values) if low is None else low, np.max(values) if high is None else high
    picture = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    for r, c in np.argwhere(np.asarray(values) >= least):
        ink = "white" if is_dark(picture.cmap(picture.norm(values[r, c]))) else "black"
        axis.text(c, r, form.format(values[r, c]), ha="center", va="center", fontsize=6, color=ink)


def is_dark(rgb):
    """Whether white letters are read better than black ones on a colour, r, g, b in 0..1."""
    return np.dot(rgb[:3], (0.3, 0.6, 0.1)) < 0.5


def save_samples(samples, path):
    """Each photo once, in a row with truth and prediction of every domain that has it; class names below.

    samples: [(domain, [(image (H, W, 3), truth (H, W), prediction (H, W)), ...]), ...].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    groups = []  # of domains with the same photos
    for domain, triples in samples:
        group = next((group for group in groups if same_photos(group[0][1], triples)), None)
        if group is None:
            groups.append(group := [])
        group.append((domain, triples))
    width, sizes = 1.7, []  # inches of a picture, heights of each group's rows
    for group in groups:
        ratios = [image.shape[0] / image.shape[1] for image, _, _ in group[0][1]]
        sizes.append([*(width * ratio + 0.25 for ratio in ratios),
                      0.3 + 0.16 * max((d.num_classes + 1) // 2 for d, _ in group)])
    columns = max(1 + 2 * len(group) for group in groups)
    figure = Figure(figsize=(width * columns, sum(map(sum, sizes))), dpi=110)
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(groups), 1, height_ratios=list(map(sum, sizes)), squeeze=False)
    for part, group, heights in zip(parts[:, 0], groups, sizes):
        grid = part.add_gridspec(len(heights), columns, height_ratios=heights, left=0.005, right=0.995,
                                 top=0.98, bottom=0.005, wspace=0.03, hspace=0.06)
        for row in range(len(heights) - 1):
            shown = [(group[0][1][row][0], "photo")]
            for domain, triples in group:
                _, truth, prediction = triples[row]
                shown += [(colourise(truth, domain), f"{domain.name}: truth"),
                          (colourise(prediction, domain), "prediction")]
            for column, (picture, title) in enumerate(shown):
                axis = part.add_subplot(grid[row, column])
                axis.imshow(picture, interpolation="nearest")
                axis.set_title(title, fontsize=8, pad=2)
                axis.axis("off")
        for n, (domain, _) in enumerate(group):
            axis = part.add_subplot(grid[-1, 1 + 2 * n:3 + 2 * n])
            axis.axis("off")
            names_of(axis, domain)
    figure.savefig(path)


def same_photos(one, two):
    """Whether two lists of samples are of the same photos."""
    return len(one) == len(two) and all(np.array_equal(a[0], b[0]) for a, b in zip(one, two))


def names_of(axis, domain):
    """The classes' names and colours, in two columns."""
    from matplotlib.patches import Patch
    patches = [Patch(facecolor=colour, edgecolor="0.5", linewidth=0.4, label=written(name, k))
               for k, (name, colour) in enumerate(zip(domain.classes, domain.palette() / 255))]
    axis.legend(handles=patches, loc="upper center", ncols=2, fontsize=7, frameon=False, handlelength=1.2,
                labelspacing=0.3, columnspacing=1)


def save_check(entries, path):
    """What `train.py --check` found, a row for each domain: photos under their labels, how frequent classes
    are, and which touch, as the domain says and as the labels do.

    entries: [(domain, [(image (H, W, 3), label (H, W)), ...], pixels of each class (Z,), share of photos in
    which two classes touch (Z, Z), NaN where no photo holds both), ...].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    shown = max(1, *(len(pictures) for _, pictures, _, _ in entries))
    widths = [1.5] * shown + [2.6, 2.6, 2.6]
    heights = [max(2.4, 0.13 * domain.num_classes + 1) for domain, *_ in entries]
    figure = Figure(figsize=(sum(widths), sum(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(entries), len(widths), squeeze=False, width_ratios=widths,
                           height_ratios=heights)
    for axes, (domain, pictures, pixels, touch) in zip(rows, entries):
        names, colours = [written(name, k) for k, name in enumerate(domain.classes)], domain.palette() / 255
        for axis in axes[:shown]:
            axis.axis("off")
        for axis, (image, label) in zip(axes, pictures):
            axis.imshow((0.3 * image + 0.7 * colourise(label, domain)).astype(np.uint8))
        axes[0].set_title(domain.name, fontsize=9, loc="left")
        share = 100 * pixels / max(1, pixels.sum())
        bars = axes[-3].barh(range(len(names)), share, color=colours, edgecolor="0.5", linewidth=0.4)
        axes[-3].bar_label(bars, [f"{s:.1f}" if s else "never" for s in share], fontsize=6, padding=2)
        axes[-3].set_yticks(range(len(names)), names, fontsize=6)
        axes[-3].set(xscale="symlog", ylim=(len(names) - 0.5, -0.5), xlim=(0, 400))
        axes[-3].tick_params(axis="x", labelsize=6)
        axes[-3].set_title("of the pixels, %", fontsize=7)
        said = np.full(touch.shape, np.nan) if domain.adjacency is None else domain.intra_mask().numpy()
        title = "touch by the domain" if domain.adjacency is not None else "the domain says nothing"
        for axis, matrix, title in ((axes[-2], said, title), (axes[-1], touch, "touch in the labels")):
            axis.imshow(matrix[1:, 1:], cmap="Blues", vmin=0, vmax=1)  # the background touches anything
            axis.set_xticks(range(len(names) - 1), names[1:], rotation=90, fontsize=5)
            axis.set_yticks(range(len(names) - 1), names[1:], fontsize=5)
            axis.set_facecolor("0.9")  # where nobody knows
            axis.set_title(title, fontsize=7)
    figure.savefig(path)


def save_curves(lines, path):
    """Losses, validation mIoU and what is measured of SST over steps. lines: the objects of log.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    train, val, gradient = ([line for line in lines if line["kind"] == kind]
                            for kind in ("train", "val", "gradient"))
    rows = 2 if train and train[0]["cos"] else 1  # without SST there is no X
    figure = Figure(figsize=(15, 3.5 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    (losses, shares, miou), *below = figure.subplots(rows, 3, squeeze=False)
    steps = [line["step"] for line in train]
    # A label domain has one colour in all panels, and so has each kind of loss term. Greys are sums.
    domains = [*(train[0]["cos"] if train else ()), *(val[0]["miou"] if val else ())]
    colours = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(domains))}
    colours |= dict(zip(("dataset", "img", "cross", "seg", "aux", "total"),
                        ("C7", "k", "C8", "C5", "C6", "0.7")))
    for name in train[0]["loss"] if train else ():
        kind, _, domain = name.partition("/")
        losses.plot(steps, smooth([line["loss"][name] for line in train]), ":" if kind == "aux" else "-",
                    color=colours.get(domain or kind), label=name, linewidth=1.3)
    losses.set(title="training losses (smoothed)", yscale="log")
    for name in gradient[0]["shares"] if gradient else ():
        points = [(line["step"], 100 * line["shares"].get(name, 0)) for line in gradient]
        shares.plot(*zip(*points), "o-", color=colours.get(name), label=name, linewidth=1, markersize=3)
    shares.set(title="share of the backbone's gradient, %", ylim=(-3, 103))
    for name in val[0]["miou"] if val else ():
        miou.plot([line["step"] for line in val], [line["miou"][name] for line in val], "o-",
                  color=colours[name], label=name, linewidth=1, markersize=3)
    miou.set(title="validation mIoU, %")
    titles = {"cos": "mean cosine of the rows of X (1: collapsed)",
              "centred": "without their mean and signs (1: one direction)", "rank": "effective rank of these"}
    for axis, (key, title) in zip(sum(map(list, below), []), titles.items()):
        for name in train[0].get(key, ()) if train else ():  # a log of an earlier version lacks some
            for of, style, label in (("x0", "-", "X_0"), ("xl", ":", "X_L")):
                # A micro-batch without images of the domain has no X_L.
                points = [(line["step"], line[key][name][of]) for line in train if of in line[key][name]]
                if points:
                    axis.plot(*zip(*points), style, color=colours[name], linewidth=1.3,
                              label=f"{name} {label}")
        axis.set(title=title)
    for axis in figure.axes:
        if axis.lines:  # beside the curves, never on them
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        else:
            axis.text(0.5, 0.5, "none in this run", ha="center", transform=axis.transAxes, color="0.5")
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    figure.savefig(path)


def save_confusion(matrix, truth, predicted, title, path):
    """A confusion matrix (Z, P) as a picture: of each true class, the percentages predicted as each class.

    truth, predicted: names of the Z rows and P columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 0.34 * len(predicted) + 2.6, 0.3 * len(truth) + 2.2
    figure = Figure(figsize=size, dpi=120, layout="constrained")
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
