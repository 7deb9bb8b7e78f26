"""Fixtures that several parts of the tests share."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

_SCHEMAS: list[torch.library.Library] = []
"""Keeps the schemas registered: they end with the object."""


def _torchvision_schemas() -> None:
    """Beside a CPU build of torch, torchvision cannot load its compiled ops: its Python needs their schemas."""
    if not _SCHEMAS and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)


@pytest.fixture(scope="session")
def torchvision_video() -> ModuleType:
    """`torchvision.models.video`, for `swin3d_t`, `_s` and `_b`."""
    _torchvision_schemas()
    reason = "needs torchvision: pip install --no-deps torchvision==0.28.0 (make test does it)"
    return pytest.importorskip("torchvision.models.video", reason=reason)


@pytest.fixture(scope="session")
def flava() -> ModuleType:
    """The transformers package, from which tests take `FlavaImageCodebook`."""
    _torchvision_schemas()  # transformers imports torchvision where that is installed
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'transformers>=4.50'")
