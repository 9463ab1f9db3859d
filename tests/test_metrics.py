"""mIoU and mean accuracy against matrices worked out by hand."""

import numpy as np
import pytest

from sst.metrics import confusion, scores


def test_confusion_counts_by_hand():
    label = np.array([[0, 1, 1], [2, 255, 0]])
    prediction = np.array([[0, 1, 0], [1, 2, 0]])
    # truth 0: predicted 0 twice. truth 1: once 1, once 0. truth 2: once 1. The ignored pixel counts nowhere.
    assert confusion(prediction, label, 3).tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_scores_by_hand():
    # IoU: 0: 2/(2+1) ; 1: 1/(2+2-1) ; 2: 0/(1+0-0). Recall: 2/2, 1/2, 0/1.
    result = scores(np.array([[2, 0, 0], [1, 1, 0], [0, 1, 0]]))
    assert result["iou"] == pytest.approx([200 / 3, 100 / 3, 0])
    assert result["miou"] == pytest.approx(100 / 3) and result["mean_accuracy"] == pytest.approx(50)
    assert result["absent"] == []


def test_absent_classes_are_left_out_and_said():
    # Class 1 is in neither; class 2 only in the prediction: it has IoU 0 but no recall.
    result = scores(np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]]))
    assert result["absent"] == [1] and np.isnan(result["iou"][1])
    assert result["miou"] == pytest.approx((75 + 0) / 2) and result["mean_accuracy"] == pytest.approx(75)


def test_perfect_prediction_is_100():
    label = np.arange(12).reshape(3, 4) % 5
    result = scores(confusion(label, label, 5))
    assert result["miou"] == 100 and result["mean_accuracy"] == 100
