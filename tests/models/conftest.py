"""Torchvision's models of images and of clips, for their names and outputs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from swins import scrambled
from torch import nn


@pytest.fixture(scope="session")
def swin(torchvision_video: ModuleType) -> nn.Module:
    """Torchvision's `swin_t` of images."""
    from torchvision.models import swin_t

    torch.manual_seed(0)
    return scrambled(swin_t())


@pytest.fixture(scope="session")
def swin3d(torchvision_video: ModuleType) -> nn.Module:
    """Torchvision's video Swin, as small as `SEVEN`."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    torch.manual_seed(0)
    return scrambled(SwinTransformer3d([2, 4, 4], 16, [2, 2, 2, 2], [1, 2, 4, 8], [8, 7, 7], num_classes=11))
