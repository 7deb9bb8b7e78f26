"""Where a step's time goes: data, tokenizer, encoder, head, optimizer."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bevt.models.video_swin import VideoSwin
from bevt.models.vit import VideoTransformer

PHASES = ("data", "tokenizer", "encoder", "head", "optimizer")
"""In order of the step. `encoder` is with its patch embedding, `head` is all behind it; both forward and backward."""


class Phases:
    """Marks along a step, each at the end of a phase. On CUDA they are events, which nobody waits for until `read`.

    Between what the model's encoder returns (of a Video Swin the last map) and its gradient lies the head. Marks pile
    up until `start`; a model's encoder keeps a hook of each.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        encoder = next(module for module in model.modules() if isinstance(module, (VideoSwin, VideoTransformer)))
        encoder.register_forward_hook(self._encoded)
        self.start()

    def start(self) -> None:
        """Begin to measure: forget what was marked."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What was done since the last mark was `phase`; "": none of a step's."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds in each phase since `start`; waits for the device."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:]):
            if phase:
                seconds[phase] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _encoded(self, encoder: nn.Module, inputs: Any, outputs: list[Tensor] | Tensor) -> None:
        last = outputs if isinstance(outputs, Tensor) else outputs[-1]
        if last.requires_grad:  # not in evaluation
            self.mark("encoder")
            last.register_hook(lambda grad: self.mark("head"))
