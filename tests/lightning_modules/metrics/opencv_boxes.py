"""Boxes by OpenCV: what ours must equal."""

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray


def opencv_boxes(
    map: NDArray[np.floating], thresholds: Iterable[float], every: bool
) -> list[list[list[int]]]:
    """Sorted boxes of a map in [0, 1] at each threshold, of the largest or of every contour."""
    values = (map * 255).astype(np.uint8)
    height, width = values.shape
    found = []
    for threshold in thresholds:
        _, mask = cv2.threshold(values, int(threshold * values.max()), 255, cv2.THRESH_BINARY)
        contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        if contours and not every:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        found.append(sorted(boxes) or [[0, 0, 0, 0]])
    return found
