"""`flash-attention-bench`: implementations side by side with torch's own kernels.

One process, one device, interleaved rounds. `python -m flash_attention_testkit.bench` is the same
command. The modules, in the order in which a measurement passes through them:

- `grids`: which cells there are, and how much work each is.
- `backends`: how a cell's call is made to run on one implementation.
- `timing`: the clock, the order of turns, median and quartiles.
- `measure`: one cell after the other; a cell that cannot run says why.
- `record`: figures as rows, and rows as JSON.
- `table`, `plot`: rows for people.
- `cli`: the command.

`grids`, `timing`, `record` and `table` import no torch.
"""
