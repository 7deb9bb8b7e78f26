"""`python -m benchmarks.data`: how fast real files become samples, backend by backend, and what a manifest of 100,000
videos costs; rows in benchmarks/results/data.jsonl.

The sources: the folder of real clips (BEVT_TEST_VIDEOS), their transcodes to VP9, the embedded dataset's clips and
stills, and photographs of ImageNet's usual size cut from the real clips. The measuring is `bevt data bench`'s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from benchmarks import rows, verify
from benchmarks.arguments import obstacle, positive, seconds
from bevt.config import DataConfig
from bevt.data import pyav, shapes
from bevt.data.bench import bench
from bevt.data.entry import Entry, Kind
from bevt.data.manifest import Manifest

ENTRIES = 100_000
PHOTO = (500, 375)
"""(width, height) of most of ImageNet's pictures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data")
    parser.add_argument(
        "--videos", type=Path, default=os.environ.get("BEVT_TEST_VIDEOS", verify.ROOT / "../shared/videos")
    )
    parser.add_argument("--scratch", type=Path, default=verify.ROOT / "build" / "benchmarks-data")
    parser.add_argument("--workers", type=positive, default=2, help="decoding processes, or DALI's threads")
    parser.add_argument("--seconds", type=seconds, default=8, help="for each measurement")
    parser.add_argument("--out", type=Path, default=verify.ROOT / "benchmarks" / "results" / "data.jsonl")
    args = parser.parse_args(arguments)
    if why := obstacle(args.out):
        print(f"nothing is measured: {why}", file=sys.stderr)
        return 2
    common = {**rows.environment("cpu"), "op": "data", "device": "cpu", "dtype": "uint8", "threads": None}
    common["workers"] = args.workers
    found = [{**common, **row} for row in manifest_rows(args.scratch)]
    embedded = shapes.ensure(args.scratch, train_clips=40, val_clips=2, train_images=60, val_images=2)
    clip = DataConfig(workers=args.workers)
    small = DataConfig(workers=args.workers, frames=8, stride=4, short_side=(96, 112), crop=96)
    cases: list[tuple[str, str, Kind, DataConfig]] = [
        ("embedded clips", embedded.train_clips, "clips", small),
        ("embedded stills", embedded.train_images, "images", small),
    ]
    if args.videos.is_dir():
        cases += [
            ("real clips", str(args.videos), "clips", clip),
            ("real clips in VP9", str(transcoded(args.videos, args.scratch / "vp9")), "clips", clip),
            ("photographs", str(photographs(args.videos, args.scratch / "photographs")), "images", clip),
        ]
    else:
        print(f"no folder {args.videos}: the cases of real clips are left out (--videos)")
    for case, source, kind, data in cases:
        report = bench(source, kind, data, seconds=args.seconds)
        print(f"\n== {case}", flush=True)
        rows_of_case = [
            {
                "contestant": name,
                "samples_per_second": row.rate,
                "megabytes_per_second": row.megabytes,
                **{f"{part}_ms": value for part, value in row.parts._asdict().items()},
            }
            for name, row in report.rows.items()
        ]
        rows_of_case += [{"contestant": name, "decode_ms": ms} for name, ms in report.bare.items()]
        for row in rows_of_case:
            print(row)
        print(f"auto: {report.choice.name}, {report.choice.why}")
        quantity = f"{data.frames} frames, stride {data.stride}" if kind == "clips" else "1 image"
        rows_of_case += [{"contestant": name, "absent": why} for name, why in report.refused.items()]
        auto = {"auto": report.choice.name, "auto_why": report.choice.why}
        found += [{**common, "case": case, "quantity": quantity, **row, **auto} for row in rows_of_case]
    rows.save(args.out, found)
    return 0


def manifest_rows(scratch: Path) -> list[rows.Row]:
    """Loading a manifest of ENTRIES videos of 25 key frames each, and the first request, in a process of their own."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "manifest.jsonl"
    keys = tuple((12 * i, 6006 * i) for i in range(25))
    entries = tuple(
        Entry(
            f"class_{i % 400:03d}/video_{i:06d}_000010_000020.mp4", 500_000 + i, 10**18 + i, None, f"class {i % 400}",
            340, 256, "h264", "yuv420p", 300, Fraction(30000, 1001), False, 12, 10.01, keys, timing=(0, 500.5),
        )
        for i in range(ENTRIES)
    )  # fmt: skip
    Manifest("clips", str(scratch), entries).save(path)
    os.sync()  # what is mapped of a file that still has to be written would count as this process's memory
    code = (
        "import sys, time\n"
        "from bevt.config import DataConfig\n"
        "from bevt.data.manifest import Manifest\n"
        "from bevt.data.sampling import Sampler\n"
        "def held():\n"
        "    for line in open('/proc/self/smaps_rollup'):\n"
        "        if line.startswith('Private_Dirty'):\n"
        "            return int(line.split()[1]) / 1024\n"
        "before, begin = held(), time.perf_counter()\n"
        "manifest = Manifest.load(sys.argv[1]); loaded = time.perf_counter()\n"
        "memory = held() - before; started = time.perf_counter()\n"
        "sampler = Sampler(manifest, DataConfig(), 'clips', 0); sampler.request(0); ready = time.perf_counter()\n"
        "for position in range(1, 1001): sampler.request(position)\n"
        "end = time.perf_counter()\n"
        "print(loaded - begin, memory, ready - started, held() - before - memory, (end - ready) / 1000)\n"
    )
    measured = [
        [
            float(word)
            for word in subprocess.run(
                [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        for _ in range(5)
    ]
    load, memory, first, more, request = (sorted(column)[2] for column in zip(*measured, strict=True))
    print(
        f"{ENTRIES} entries ({path.stat().st_size / 1e6:.0f} MB): loaded in {load:.3f} s, {memory:.1f} MiB of its own; "
        f"sampler and first request {first:.3f} s, {more:.1f} MiB; a request {1e6 * request:.0f} us"
    )
    path.unlink()
    return [
        {
            "case": "manifest", "quantity": f"{ENTRIES} videos", "contestant": "Manifest.load", "load_seconds": load,
            "load_mib": memory, "first_request_seconds": first, "sampler_mib": more, "request_us": 1e6 * request,
        }
    ]  # fmt: skip


def transcoded(videos: Path, folder: Path) -> Path:
    """The real clips in VP9 at their own size and rate, a key frame every 64."""
    av = pyav.library()
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(path for path in videos.iterdir() if path.suffix in (".mp4", ".avi")):
        target = folder / f"{source.stem}.webm"
        if target.exists():
            continue
        part = folder / f".{source.stem}.webm"
        with av.open(str(source)) as read, av.open(str(part), "w") as write:
            video = read.streams.video[0]
            options = {"deadline": "realtime", "cpu-used": "6", "crf": "28", "b": "0", "g": "64"}
            stream = write.add_stream("libvpx-vp9", rate=video.average_rate, options=options)
            stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
            for number, frame in enumerate(read.decode(video)):
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base, frame.pict_type = number, 1 / video.average_rate, 0
                write.mux(stream.encode(frame))
            write.mux(stream.encode())
        part.rename(target)
    return folder


def photographs(videos: Path, folder: Path, count: int = 40) -> Path:
    """JPEGs of PHOTO pixels, quality 92, of frames of the real clips."""
    av = pyav.library()
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(path for path in videos.iterdir() if path.suffix in (".mp4", ".avi")):
        with av.open(str(source)) as container:
            frames = (frame for number, frame in enumerate(container.decode(video=0)) if number % 16 == 0)
            for number, frame in zip(range(count // 4), frames, strict=False):
                picture = frame.to_image(width=PHOTO[0], height=PHOTO[1], interpolation="LANCZOS")
                picture.save(folder / f"{source.stem}_{number}.jpg", quality=92)
    return folder


if __name__ == "__main__":
    sys.exit(main())
