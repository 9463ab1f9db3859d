"""mIoU and mean accuracy, as the field computes them: from one confusion matrix over the whole set."""

import numpy as np

from .domains import IGNORE


def confusion(prediction, label, num_classes):
    """(Z, Z) int64: entry [t, p] counts the pixels of true class t that were predicted p; ignored pixels are left out.

    prediction, label: (H, W) integer arrays.
    """
    seen = label != IGNORE
    pairs = label[seen].astype(np.int64) * num_classes + prediction[seen]
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(matrix):
    """From a confusion matrix: {"miou", "mean_accuracy", "iou": (Z,), "absent": ids}, all but the ids in percent.

    IoU = true positives / (truth + prediction - true positives). A class that neither truth nor prediction holds has no IoU
    (NaN) and is left out of the mean; a class that the truth lacks is left out of mean accuracy (mean recall per class).
    """
    hit, truth, predicted = np.diag(matrix).astype(float), matrix.sum(1), matrix.sum(0)
    union = truth + predicted - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = 100 * np.where(union > 0, hit / union, np.nan)
        recall = 100 * np.where(truth > 0, hit / truth, np.nan)
    return {"miou": mean(iou), "mean_accuracy": mean(recall), "iou": iou, "absent": np.flatnonzero(union == 0).tolist()}


def mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
