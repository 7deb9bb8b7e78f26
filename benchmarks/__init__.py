"""Speed and memory of the ops beside what others offer; how to run it is in CONTRIBUTING.md.

`registry` says what is measured, `problems` makes it runnable, `verify` is the gate before any time, `timing` and
`memory` measure, `rows` keeps the results, `run` and `gpu` are the commands.
"""
