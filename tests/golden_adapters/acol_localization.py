"""ACoL: from golden cases to maps, boxes and localization metrics; the rest is in ``acol``."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.acol.losses import erase_mask
from lightning_modules.metrics.boxes import (
    box_iou_inclusive,
    boxes_from_map,
    cam_dt_boxes,
    component_polygon_area,
    resize_box,
)
from lightning_modules.metrics.localization import (
    LocalizationError,
    MaxBoxAcc,
    MaxBoxAccV2,
    PxAP,
    localization_flags,
)
from lightning_modules.nn.maps import fuse_maps, normalize_map, upsample_map

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _normalize(case: Case) -> Values:
    return {"y": normalize_map(_tensor(case["inputs"]["x"]))}


def _normalize_constant(case: Case) -> Values:
    y = normalize_map(_tensor(case["inputs"]["x"]))
    return {"y": y, "keep": erase_mask(y, case["inputs"]["threshold"]).double()}


def _fuse(case: Case) -> Values:
    return {"fused": fuse_maps([_tensor(case["inputs"]["a"]), _tensor(case["inputs"]["b"])])}


def _upsample(case: Case) -> Values:
    values, size = _tensor(case["inputs"]["map"]), case["inputs"]["size"]
    bicubic = upsample_map(values, size)
    return {
        "bicubic": bicubic,
        "bilinear": upsample_map(values, size, mode="bilinear"),
        "bicubic_normalized": normalize_map(bicubic),
    }


def _boxes(case: Case) -> Values:
    values, thresholds = _tensor(case["inputs"]["map"]), case["inputs"]["thresholds"]
    every = boxes_from_map(values, thresholds, select="all")
    return {
        "largest": torch.cat(boxes_from_map(values, thresholds, select="largest")),
        "all_sorted": every,
        "n_contours": [len(boxes) for boxes in every],
    }


def _polygon_area(case: Case) -> Values:
    area, pixels = component_polygon_area(torch.tensor(case["inputs"]["mask"]))
    return {"polygon_area": area, "pixel_count": pixels}


def _iou(case: Case) -> Values:
    return {"iou": box_iou_inclusive(case["inputs"]["a"], case["inputs"]["b"])}


def _resize(case: Case) -> Values:
    inputs = case["inputs"]
    return {"resized": resize_box(inputs["boxes"], inputs["sizes"], inputs["new_size"])}


def _max_box_acc(case: Case) -> Values:
    inputs = case["inputs"]
    maps = _tensor(inputs["maps"])
    boxes = [torch.tensor(rows) for rows in inputs["gt_boxes"]]
    ious, thresholds = inputs["iou_thresholds"], inputs["cam_thresholds"]
    values: Values = {}
    for version, metric in (
        ("v1", MaxBoxAcc(ious, thresholds=thresholds)),
        ("v2", MaxBoxAccV2(ious, thresholds=thresholds)),
    ):
        metric.update(maps, boxes)
        found = metric.compute()
        per_iou = [found[f"{metric.name}@{100 * iou:g}"] for iou in ious]
        values[f"num_correct_{version}"] = metric.hits
        values[f"max_box_acc_{version}_per_iou"] = per_iou
        values["MaxBoxAcc" if version == "v1" else "MaxBoxAccV2"] = (
            found["max_box_acc@50"] if version == "v1" else found["max_box_acc_v2"]
        )
    return values


def _pxap(case: Case) -> Values:
    inputs = case["inputs"]
    steps = round(1 / inputs["cam_threshold_step"])
    metric = PxAP(np.arange(steps) / steps)  # values of these maps lie on the edges
    metric.update(_tensor(inputs["maps"]), torch.tensor(inputs["masks"]))
    return {
        "PxAP": metric.compute()["pxap"],
        "n_pos": metric.positive.sum(),
        "n_neg": metric.negative.sum(),
    }


def _localization_error(case: Case) -> Values:
    inputs = case["inputs"]
    labels, classes, boxes, known = (
        torch.tensor(inputs[name]) for name in ("label", "top5", "top5_boxes", "gt_known_box")
    )
    truth = [torch.tensor(rows) for rows in inputs["gt_boxes"]]
    flags = localization_flags(classes, boxes, labels, truth)
    flags["gt_known"] = localization_flags(
        labels[:, None], known[:, None], labels, truth, topk=(1,)
    )["top1_loc"]
    columns = ("top1_cls", "top5_cls", "top1_loc", "top5_loc", "gt_known")
    metric = LocalizationError()
    metric.update(classes, boxes, labels, truth, known)
    return {
        "flags": torch.stack([flags[name] for name in columns], dim=1).long(),
        **metric.compute(),
    }


def _cam_boxes(case: Case) -> Values:
    inputs = case["inputs"]
    return {"boxes_xywh": cam_dt_boxes(inputs["heatmap"], inputs["thresholds"])}


ADAPTERS = {
    "normalize_map_per_image": _normalize,
    "normalize_map_per_image_per_class": _normalize,
    "normalize_map_constant": _normalize_constant,
    "fuse_maps_max": _fuse,
    "upsample_map": _upsample,
    "boxes_from_map": _boxes,
    "boxes_from_map_single_component": _boxes,
    "boxes_from_map_two_components_unequal": _boxes,
    "boxes_from_map_two_components_tie": _boxes,
    "boxes_from_map_tie_same_rows": _boxes,
    "boxes_from_map_thin_line_vs_block": _boxes,
    "boxes_from_map_ring_with_hole": _boxes,
    "boxes_from_map_touches_border": _boxes,
    "boxes_from_map_all_zero": _boxes,
    "boxes_from_map_diagonal_touch": _boxes,
    "boxes_from_map_single_pixel": _boxes,
    "component_polygon_area": _polygon_area,
    "box_iou_inclusive": _iou,
    "resize_box": _resize,
    "max_box_acc": _max_box_acc,
    "pxap_step": _pxap,
    "top1": _localization_error,
    "cam_dt_boxes": _cam_boxes,
}
