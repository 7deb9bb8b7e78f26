"""`--profile`: what a few steps spend their time on, as a trace and as a table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM, ACTIVE = 3, 2, 3
"""Steps that are left alone (they compile and tune), that warm the profiler up, and that are recorded."""

STEPS = WAIT + WARM + ACTIVE
"""That it takes."""

ROWS = 60
"""Of the table."""


class Profile:
    """Records a few steps into `profile/` of the run folder: `trace.json` (chrome://tracing, Perfetto), `table.txt`."""

    def __init__(self, out: Path, device: torch.device) -> None:
        self.folder = out / "profile"
        self.done = False
        """Both files are written."""
        self._sort = f"self_{device.type}_time_total"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profile.start()

    @property
    def busy(self) -> bool:
        """The next `step` takes time of its own: it warms the profiler up, or starts or ends the recording."""
        return not self.done and self._profile.step_num + 1 in (WAIT, WAIT + WARM, STEPS)

    def step(self) -> None:
        """A step of training has ended."""
        if not self.done:
            self._profile.step()

    def close(self) -> None:
        """Stop; a run that was too short has recorded nothing."""
        if not self.done:
            self._profile.on_trace_ready = None
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json"))
        table = recorded.key_averages().table(sort_by=self._sort, row_limit=ROWS, max_name_column_width=80)
        (self.folder / "table.txt").write_text(table + "\n")
        self.done = True
