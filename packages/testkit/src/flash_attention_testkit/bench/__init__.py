"""`flash-attention-bench`: implementations side by side with torch's own kernels.

One process, one device, interleaved rounds. `python -m flash_attention_testkit.bench` is the same
command. The modules, in the order in which a measurement passes through them:

- `grids`: which cells there are, and how much work each is.
- `backends`: how a cell's call is made to run on one implementation.
- `timing`: the clocks, who has a turn when, median and quartiles.
- `measure`: every implementation's figures in one cell, or why it has none.
- `run`, `environment`: cell after cell, and what the figures depend on.
- `record`: figures as rows, and rows as JSON.
- `table`, `markdown`, `panels` and `plot`: rows for a terminal, a page and a figure.
- `cli`: the command.

Measuring needs torch alone, showing records does without it; only `plot` needs matplotlib.
"""
