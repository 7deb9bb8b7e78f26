"""Speed and memory of the ops beside what others offer; how to run it is in CONTRIBUTING.md.

What is measured: `registry` names it, `problems` makes it runnable.
The measuring: `verify` is the gate before any time; `timing` and `memory` measure, `limits` what the machine can do.
The results: `rows` writes them, `runs` picks the newest, `plots` and `readme` show them, `tables` prints.
Commands that measure: `run` an op, `suite` all, `data` decoders, `tokenizer` masked frames; `bench_ops`, under pytest.
Commands that compare: `check` another commit (`check_worker`, `trees`), `compare_losses` two runs, `tune` tile sizes.
Commands that look at kernels: `aot` counts machine code without a GPU, `ncu` asks NVIDIA's profiler.
"""
