"""What other people's packages need before they import beside this torch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

import torch

_SCHEMAS: list[torch.library.Library] = []
"""Keeps the schemas registered: they end with the object."""


def torchvision_schemas() -> None:
    """Make torchvision's Python importable where its compiled ops are of another build of torch: it asks for these."""
    if importlib.util.find_spec("torchvision") and not _SCHEMAS and not hasattr(torch.ops.torchvision, "nms"):
        with contextlib.suppress(Exception):  # of many kinds; where it imports, nothing is missing
            importlib.import_module("torchvision")
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
