"""mIoU and mean accuracy, as the field computes them: from one confusion matrix over the whole set."""

import numpy as np

from .domains import IGNORE


def confusion(prediction, label, num_classes, predicted_classes=None):
    """(Z, P) int64: entry [t, p] counts the pixels of true class t that were predicted p.

    prediction, label: (H, W) integer arrays; pixels whose label is ignored are left out. Z = num_classes. P =
    predicted_classes where a head of other classes predicts, else Z.
    """
    P = predicted_classes or num_classes
    seen = label != IGNORE
    pairs = label[seen].astype(np.int64) * P + prediction[seen]
    return np.bincount(pairs, minlength=num_classes * P).reshape(num_classes, P)


def mapped(matrix, to):
    """The confusion matrix (Z, Z + 1) of a head of other classes.

    matrix: (Z, P) of that head's classes. to: (P,), the true class of each of them, Z for none. Column Z
    holds the pixels that were predicted as such a class.
    """
    result = np.zeros((len(matrix), len(matrix) + 1), np.int64)
    np.add.at(result.T, to, matrix.T)
    return result


def scores(matrix, left_out=()):
    """From a confusion matrix: {"miou", "mean_accuracy", "iou": (Z,), "accuracy": (Z,), "absent": ids}.

    All but the ids are in percent. IoU = true positives / (truth + prediction - true positives); accuracy is
    recall per class. A class that neither truth nor prediction holds is absent: it has no IoU (NaN) and is
    left out of the mean. A class that the truth lacks is left out of mean accuracy. A matrix (Z, Z + 1) has
    predictions of no class in its last column: they are wrong, whatever the truth.
    left_out: ids that count in neither mean. Pixels predicted as another class still count against that one.
    """
    Z = len(matrix)
    hit, truth, predicted = np.diag(matrix).astype(float), matrix.sum(1), matrix.sum(0)[:Z]
    union, counted = truth + predicted - hit, ~np.isin(np.arange(Z), left_out)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = 100 * np.where(counted & (union > 0), hit / union, np.nan)
        accuracy = 100 * np.where(counted & (truth > 0), hit / truth, np.nan)
    return {"miou": mean(iou), "mean_accuracy": mean(accuracy), "iou": iou, "accuracy": accuracy,
            "absent": np.flatnonzero(counted & (union == 0)).tolist()}


def mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def summary(results, domains):
    """The scores {domain: scores} as a table: a line a domain, and which classes its means are without."""
    classes = {d.name: d.classes for d in domains}
    lines = [f"{'validation':<12} {'mIoU %':>8} {'mean accuracy %':>16}"]
    for name, result in results.items():
        line = f"{name:<12} {result['miou']:>8.2f} {result['mean_accuracy']:>16.2f}"
        if result["absent"]:
            absent = ", ".join(classes[name][i] for i in result["absent"])
            line += f"   (without {absent}: in no label and no prediction)"
        lines.append(line)
    return "\n".join(lines)
