"""Train a GPT of 100 million parameters on torch's own attention and on an implementation.

    commit=$(git rev-parse HEAD)
    python docs/benchmarks/train_gpt.py run --seed 1 2 3 --commit $commit --output record.json
    python docs/benchmarks/train_gpt.py table record.json
    python docs/benchmarks/train_gpt.py plot record.json -o figure.svg

Every run is a process of its own, the same program: one on what torch chooses by itself, one for
each `--impl` with `FLASH_ATTENTION_IMPL` set, and others on backends of torch's that are forced.
With one seed all have the same weights at first and the same batches, and still their curves part,
since each rounds in its own way and training magnifies that. So the question is whether ours lies
further from torch's backends than they lie from each other. It is answered by one number, chosen
before these runs were made: the *gap* of two runs of one seed is the mean over steps of
the distance of their smoothed curves; ours is the geometric mean of the gaps to each of torch's
backends over all seeds, torch's that of the gaps between its backends, and the first is divided by
the second. A backend that was run twice counts once; what lies between its runs is shown apart.

The text is the Python sources of the standard library and of torch, as bytes. A record that is
already there is extended: `--runs` and `--seed` name the runs to make. Implementations are those
that are installed; `--register fa4_cuda:register` does without that. `--size smoke` shows on any
CPU that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_registry import (
    activate_requested_flash_attention_impl,
    current_flash_attention_impl,
)
from flash_attention_registry.sdpa import dispatch_counts
from flash_attention_testkit.bench.environment import environment
from flash_attention_testkit.bench.record import fingerprint, write_record

NATIVE = "native"
BACKENDS = {
    "torch:flash": SDPBackend.FLASH_ATTENTION,
    "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch:math": SDPBackend.MATH,
}
FORCED = {"cuda": ("torch:flash", "torch:efficient"), "cpu": ("torch:math",)}
"""The backends that are run besides stock's own choice, by device."""
TITLES = {
    NATIVE: "stock's own choice",
    "torch:flash": "stock's FlashAttention-2",
    "torch:cudnn": "stock's cuDNN",
    "torch:efficient": "stock's memory-efficient",
    "torch:math": "stock's math",
}
COLOURS = {
    NATIVE: "#1f4e79",
    "torch:flash": "#8fb3d9",
    "torch:cudnn": "#5b7fa6",
    "torch:efficient": "#9a9a9a",
}
OTHER_COLOURS = ("#e8710a", "#7b3fa0", "#2a9d5c")
SMOOTH = 20
"""Steps that a smoothed loss is the mean of: the step itself and those before it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs of a record have in common."""

    device: str = "cuda"
    layers: int = 14
    heads: int = 6
    head_dim: int = 128
    seq_len: int = 4096
    batch: int = 6
    steps: int = 300
    window: int = 20  # steps from one synchronisation to the next
    warmup: int = 40  # steps that no time is taken of
    compiled: bool = True
    learning_rate: float = 6e-4
    rising: int = 30  # steps until the learning rate is there; from then on it falls
    weight_decay: float = 0.1
    clip: float = 1.0
    most_text: int = 64 << 20  # bytes that are read

    @property
    def width(self) -> int:
        """Channels."""
        return self.heads * self.head_dim


SIZES = {
    "gpt-100m": Settings(),
    "smoke": Settings(
        device="cpu",
        layers=2,
        heads=2,
        head_dim=16,
        seq_len=64,
        batch=4,
        steps=24,
        window=4,
        warmup=8,
        compiled=False,
        learning_rate=3e-3,
        rising=4,
        most_text=1 << 20,
    ),
}


class Block(nn.Module):
    """Attention and a perceptron, each normalised first and added."""

    def __init__(self, settings: Settings) -> None:
        """Make the layers."""
        super().__init__()
        width = settings.width
        self.shape = (settings.heads, settings.head_dim)
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Go from one residual stream to the next."""
        parts = self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, self.shape).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.before_mlp(x)), approximate="tanh")
        return x + self.down(hidden)  # type: ignore[no-any-return] # a module's call is Any


class GPT(nn.Module):
    """A plain decoder of bytes, whose last layer is its embedding."""

    def __init__(self, settings: Settings) -> None:
        """Make the layers and draw their weights."""
        super().__init__()
        self.bytes = nn.Embedding(256, settings.width)
        self.places = nn.Embedding(settings.seq_len, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.last = nn.LayerNorm(settings.width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * settings.layers if added else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting all bytes `[B, S + 1]` but the first."""
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.bytes(given) + self.places(torch.arange(given.shape[1], device=given.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.last(x), self.bytes.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())


def text(most: int) -> tuple[bytes, dict[str, Any]]:
    """Return the text, and what a record says of it."""
    standard, ours = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    parts: list[bytes] = []
    length = files = 0
    for root in (standard, ours):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            outside = {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
            if outside or length >= most:
                continue
            parts.append(path.read_bytes())
            length += len(parts[-1])
            files += 1
    found = b"".join(parts)[:most]
    return found, {
        "of": f"*.py of Python {sys.version.split()[0]}'s standard library and of torch",
        "files": files,
        "bytes": len(found),
        "sha256": hashlib.sha256(found).hexdigest(),
    }


def backend_of(profile: torch.profiler.profile) -> str:
    """Return which backend of torch's the attention calls in a profile went to, from their op.

    It is that of the dispatcher: what serves an op in its place does not change it.
    """
    prefix = "aten::_scaled_dot_product_"
    keys = {event.key for event in profile.key_averages()}
    for backend in ("cudnn", "flash", "efficient"):
        if any(key.startswith(f"{prefix}{backend}_attention") for key in keys):
            return backend
    return "math"  # in compiled code it is no op at all


def train(settings: Settings, name: str, seed: int, corpus: bytes) -> dict[str, Any]:
    """Train in this process; return the run as a record holds it."""
    on_gpu = settings.device == "cuda"
    torch.manual_seed(seed)
    model = GPT(settings).to(settings.device)
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() == 2]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    loss_of: Callable[[Tensor], Tensor] = model
    if settings.compiled:
        loss_of = torch.compile(model, dynamic=False)
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).to(settings.device)
    drawn = torch.Generator().manual_seed(seed)
    last = len(corpus) - settings.seq_len - 1
    starts = torch.randint(last, (settings.steps, settings.batch, 1), generator=drawn)
    rows = starts.to(settings.device) + torch.arange(settings.seq_len + 1, device=settings.device)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    losses: list[Tensor] = []
    times: list[float] = []
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    )
    backend, began = "", time.perf_counter()
    since = began
    with contextlib.ExitStack() as stack:
        if name in BACKENDS:
            stack.enter_context(sdpa_kernel(BACKENDS[name]))
        for step in range(settings.steps):
            share = (settings.steps - step) / (settings.steps - settings.rising)
            for group in optimizer.param_groups:
                rise = (step + 1) / settings.rising
                group["lr"] = settings.learning_rate * min(1.0, rise, max(0.1, share))
            watched = profile if step == 1 else contextlib.nullcontext()
            with torch.autocast(settings.device, torch.bfloat16), watched:
                loss = loss_of(data[rows[step]].long())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if step == 0:
                wait()
                say(f"{name}, seed {seed}: first step after {time.perf_counter() - began:.0f} s")
            if step == 1:
                backend = backend_of(profile)
                check(name, backend)
            if step + 1 == settings.warmup and on_gpu:
                torch.cuda.reset_peak_memory_stats()
            if (step + 1) % settings.window == 0:
                wait()
                now = time.perf_counter()
                if step + 1 > settings.warmup:
                    times.append((now - since) / settings.window)
                say(f"step {step + 1}, loss {loss.item():.4f}, {now - began:.0f} s")
                since = time.perf_counter()
        counts = dispatch_counts()
    tokens = settings.batch * settings.seq_len
    memory = torch.cuda.memory_stats() if on_gpu else {}
    return {
        "name": name,
        "seed": seed,
        "asked_for": os.environ.get("FLASH_ATTENTION_IMPL"),
        "active": current_flash_attention_impl(),
        "torch_backend": backend,
        "parameters": sum(p.numel() for p in parameters),
        "tokens_per_second": round(tokens / statistics.median(times)),
        "ms_per_step": [round(1e3 * seconds, 3) for seconds in times],
        **{
            f"peak_{kind}_mib": round(memory[f"{kind}_bytes.all.peak"] / 2**20, 1)
            for kind in ("requested", "allocated")
            if on_gpu
        },
        "served": {op: found.served for op, found in counts.items() if found.served},
        "declined": {op: dict(found.declined) for op, found in counts.items() if found.declined},
        "losses": [round(value.item(), 5) for value in losses],
    }


def check(name: str, backend: str) -> None:
    """Exit if attention runs on what it should not run on."""
    counts = dispatch_counts()
    if name != NATIVE and name not in BACKENDS:
        if not counts.served or counts.declined:
            sys.exit(f"{name} does not serve this model: {counts}")
    elif counts.served:
        sys.exit(f"{name} should be torch's own kernel, but: {counts}")
    elif name in BACKENDS and backend != name.partition(":")[2]:
        sys.exit(f"{name} was asked for, but attention went to {backend}")


def say(words: str) -> None:
    """Tell the progress."""
    print(words, file=sys.stderr, flush=True)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the mean of the last `SMOOTH` losses, from the first step that has as many."""
    width = min(SMOOTH, len(losses))
    return [statistics.fmean(losses[end - width : end]) for end in range(width, len(losses) + 1)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Return how far the smoothed curves of two runs lie apart."""
    pairs = zip(smoothed(one["losses"]), smoothed(other["losses"]), strict=True)
    return [abs(a - b) for a, b in pairs]


def title_of(run: Mapping[str, Any]) -> str:
    """Return what a run is called in the tables and in the figure."""
    if run["name"] == NATIVE:
        return f"{TITLES[NATIVE]} ({run['torch_backend']})"
    return TITLES.get(run["name"], f"{run['active']} ({run['asked_for']})")


def is_stock(run: Mapping[str, Any]) -> bool:
    """Return whether torch's own kernels ran."""
    return run["active"] is None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that are compared, with every seed that both were made with.

    Attributes:
        title: What the two are called.
        kind: `STOCK` between two backends of torch's, `AGAIN` between two runs of one of them, or
            the name of the implementation that is compared with one of them.
        gaps: The mean distance of their smoothed curves, by seed.
    """

    title: str
    kind: str
    gaps: Mapping[int, float]


STOCK, AGAIN = "stock", "again"


def by_name(record: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return the runs of a record by name and seed, stock's own choice first."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in sorted(record["runs"], key=lambda run: run["name"] != NATIVE):
        found.setdefault(run["name"], {})[run["seed"]] = run
    return found


def pairs_of(record: Mapping[str, Any]) -> list[Pair]:
    """Return what is compared: stock's backends, ours with each, and one of them run twice."""
    runs = by_name(record)
    one_of = {name: next(iter(seeds.values())) for name, seeds in runs.items()}
    stock: dict[str, str] = {}
    ours, again = [], []
    for name, run in one_of.items():
        backend = run["torch_backend"]
        if run["active"] is not None:
            ours.append(name)
        elif backend in stock:
            again.append((AGAIN, stock[backend], name))
        else:
            stock[backend] = name
    compared = [
        *((STOCK, *names) for names in itertools.combinations(stock.values(), 2)),
        *((one_of[name]["active"], name, other) for name in ours for other in stock.values()),
        *again,
    ]
    pairs = []
    for kind, one, other in compared:
        gaps = {
            seed: statistics.fmean(differences(run, runs[other][seed]))
            for seed, run in runs[one].items()
            if seed in runs[other]
        }
        if gaps:
            pairs.append(Pair(f"{title_of(one_of[one])}, {title_of(one_of[other])}", kind, gaps))
    return pairs


def mean_gap(pairs: Iterable[Pair]) -> float:
    """Return the geometric mean over pairs and seeds; NaN of no pairs."""
    gaps = [gap for pair in pairs for gap in pair.gaps.values()]
    if not gaps:
        return math.nan
    return statistics.geometric_mean(gaps) if all(gaps) else 0.0


def verdicts(pairs: Sequence[Pair]) -> list[str]:
    """Return a sentence for each implementation: how far it lies from stock, and stock's own."""
    stock = mean_gap(pair for pair in pairs if pair.kind == STOCK)
    said = []
    for name in dict.fromkeys(pair.kind for pair in pairs if pair.kind not in (STOCK, AGAIN)):
        ours = mean_gap(pair for pair in pairs if pair.kind == name)
        said.append(
            f"{name} lies {ours:.5f} from stock's backends, which lie {stock:.5f} from each other: "
            f"{ours / stock:.2f} times as far."
        )
    return said


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown."""
    found, settings, runs = record["environment"], record["settings"], by_name(record)
    stock = runs[NATIVE]
    parameters = next(iter(stock.values()))["parameters"]
    seeds = sorted({run["seed"] for run in record["runs"]})
    lines = [
        f"{found['gpu']}, torch {found['torch']}, cuDNN {found['cudnn']}, commit "
        f"`{found['git_commit'][:7]}`, {found['date']}; {parameters / 1e6:.0f} million "
        f"parameters, {settings['batch']} x {settings['seq_len']} bytes a step, "
        f"{settings['steps']} steps, seeds {', '.join(map(str, seeds))}.",
        "",
        "| attention | tokens/s | over stock's | peak memory asked for, MiB | allocated, MiB "
        "| loss at the end, by seed | served forwards, backwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for made in runs.values():
        some = next(iter(made.values()))
        speed = statistics.median(run["tokens_per_second"] for run in made.values())
        ratios = [
            run["tokens_per_second"] / stock[seed]["tokens_per_second"]
            for seed, run in made.items()
            if seed in stock
        ]
        peaks = " | ".join(
            _range(run.get(f"peak_{kind}_mib") for run in made.values())
            for kind in ("requested", "allocated")
        )
        ends = ", ".join(f"{smoothed(run['losses'])[-1]:.4f}" for run in made.values())
        served = ", ".join(
            _range(
                sum(count for op, count in run["served"].items() if op.endswith("backward") is way)
                for run in made.values()
            )
            for way in (False, True)
        )
        ratio = f"{statistics.geometric_mean(ratios):.3f}" if ratios else ""
        lines.append(
            f"| {title_of(some)} | {round(speed):,} | {ratio} | {peaks} | {ends} | {served} |"
        )
    pairs = pairs_of(record)
    columns = "".join(f" seed {seed} |" for seed in seeds)
    lines += [
        "",
        f"| mean gap of two curves |{columns} geometric mean |",
        f"|---|{'---|' * len(seeds)}---|",
    ]
    for pair in pairs:
        gaps = "".join(
            f" {pair.gaps[seed]:.5f} |" if seed in pair.gaps else "  |" for seed in seeds
        )
        title = f"{pair.title} (one backend, run twice)" if pair.kind == AGAIN else pair.title
        lines.append(f"| {title} |{gaps} {mean_gap([pair]):.5f} |")
    for sentence in verdicts(pairs):
        lines += ["", sentence]
    return "\n".join(lines)


def _range(values: Iterable[float | None]) -> str:
    """Return what the values are: the one that all are, or the least and the most."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value}" for value in dict.fromkeys((*known[:1], *known[-1:])))


def draw(record: Mapping[str, Any], name: str, path: Path) -> None:
    """Draw the curves of the first seed, how far they part, and the gaps of all seeds."""
    # Any: matplotlib is not needed to check the types.
    matplotlib: Any = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.figure")
    runs = by_name(record)
    seed = min(run["seed"] for run in record["runs"])
    stock = runs[NATIVE][seed]
    others = [name for name in runs if name not in TITLES]
    colours = {**COLOURS, **dict(zip(others, OTHER_COLOURS, strict=False))}
    with matplotlib.rc_context({"svg.hashsalt": "train-gpt", "font.size": 9}):
        figure = matplotlib.figure.Figure(figsize=(10.5, 7), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(4, 3))
        curves, parting = above.subplots(1, 2)
        gaps = below.subplots()
        for made in runs.values():
            run = made.get(seed)
            if run is None:
                continue
            values = smoothed(run["losses"])
            steps = range(len(run["losses"]) - len(values) + 1, len(run["losses"]) + 1)
            look = {"color": colours.get(run["name"], "0.4"), "label": title_of(run)}
            style = "-" if run is stock else "--"
            curves.plot(steps, values, style, linewidth=1.4, **look)
            if run is not stock:
                parting.plot(steps, differences(run, stock), linewidth=1.2, **look)
        width = min(SMOOTH, len(stock["losses"]))
        curves.set_title(f"loss of seed {seed}, mean of {width} steps")
        parting.set_title(f"distance from {TITLES[NATIVE]}, seed {seed}")
        for axis in (curves, parting):
            axis.set_xlabel("step")
            axis.set_ylabel("nats a byte")
            axis.legend(frameon=False)
            axis.grid(axis="y", color="0.9", linewidth=0.6)
        parting.set_ylim(bottom=0)
        pairs = pairs_of(record)
        kinds = {STOCK: COLOURS[NATIVE], AGAIN: "0.6"}
        for place, pair in enumerate(reversed(pairs)):
            colour = kinds.get(pair.kind, OTHER_COLOURS[0])
            gaps.plot(list(pair.gaps.values()), [place] * len(pair.gaps), "o", color=colour)
            gaps.plot([mean_gap([pair])], [place], "|", color=colour, markersize=16)
        gaps.set_yticks(range(len(pairs)), [pair.title for pair in reversed(pairs)])
        gaps.set_ylim(-0.6, len(pairs) - 0.4)
        gaps.set_xscale("log")
        gaps.set_xlabel("nats a byte; a dot is a seed, a bar their geometric mean")
        gaps.set_title("mean distance of two runs of one seed")
        gaps.grid(axis="x", which="both", color="0.9", linewidth=0.6)
        for axis in (curves, parting, gaps):
            axis.spines[["top", "right"]].set_visible(False)
        found = record["environment"]
        origin = f"{found['gpu']}, torch {found['torch']}, commit {found['git_commit'][:7]}"
        below.supxlabel(f"{origin}, {found['date']}", fontsize=8, color="0.35")
        metadata: dict[str, str | None] = {"Description": f"{name} sha256:{fingerprint(record)}"}
        if path.suffix == ".svg":
            metadata["Date"] = None  # the same record gives the same file
        figure.savefig(path, dpi=150, metadata=metadata)


def run_all(options: argparse.Namespace) -> None:
    """Make the runs, one process after the other, and write the record after each."""
    settings = SIZES[options.size]
    corpus, described = text(settings.most_text)
    say(f"text: {described}")
    names = options.runs or [NATIVE, *options.impl, *FORCED[settings.device]]
    common = {"settings": asdict(settings), "smoothed_steps": SMOOTH, "text": described}
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if any(before[key] != value for key, value in common.items()):
            sys.exit(f"{options.output} holds runs of other settings or of another text")
        runs = {(run["name"], run["seed"]): run for run in before["runs"]}
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "text"), Path(folder, "run.json")
        source.write_bytes(corpus)
        for seed, name in itertools.product(options.seed, names):
            own = {key: value for key, value in os.environ.items() if key != "FLASH_ATTENTION_IMPL"}
            if name != NATIVE and name not in BACKENDS:
                own["FLASH_ATTENTION_IMPL"] = name
            # What torch compiled under one `sdpa_kernel` it takes from its cache under another
            # (pytorch#185449).
            own["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, name.replace(":", "-")))
            command = [sys.executable, __file__, "worker", name, str(source), str(result)]
            command += ["--size", options.size, "--commit", options.commit]
            command += ["--seed", str(seed)]
            for reference in options.register:
                command += ["--register", reference]
            subprocess.run(command, env=own, check=True)
            made = json.loads(result.read_text(encoding="utf-8"))
            where = made.pop("environment")
            runs[name, seed] = made
            record = {"environment": where, **common, "runs": list(runs.values())}
            record["environment"]["implementations"] = ", ".join(
                dict.fromkeys(run["active"] for run in runs.values() if run["active"])
            )
            write_record(options.output, record)
    if any(name == NATIVE for name, _ in runs):
        print(table(record))


def work(options: argparse.Namespace) -> None:
    """Make one run; its process has been started for it."""
    settings = SIZES[options.size]
    asked = "FLASH_ATTENTION_IMPL" in os.environ
    if asked and options.register:  # otherwise the installed provider's hook has seen to it
        for reference in options.register:
            module, _, function = reference.partition(":")
            getattr(importlib.import_module(module), function)()
        activate_requested_flash_attention_impl()
    run = train(settings, options.name, options.seed[0], options.source.read_bytes())
    run["environment"] = environment(settings.device, options.commit)
    if settings.device == "cpu":
        run["environment"].update(gpu="none (CPU)", times="of torch's CPU kernels")
    write_record(options.result, run)


def main() -> None:
    """Run, or show what a record holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making, working = commands.add_parser("run"), commands.add_parser("worker")
    for command in (making, working):
        command.add_argument("--commit", required=True, help="git commit of the measured code")
        command.add_argument("--size", choices=SIZES, default="gpt-100m")
        command.add_argument(
            "--seed", type=int, nargs="+", default=[1], help="of the weights and the batches"
        )
        command.add_argument("--register", action="append", default=[], metavar="MODULE:FUNCTION")
    making.add_argument("--output", type=Path, required=True, help="where the JSON record goes")
    making.add_argument("--impl", nargs="*", default=["FA4"], help="what the environment asks for")
    making.add_argument("--runs", nargs="*", help="native, torch:flash, ..., or what --impl names")
    working.add_argument("name")
    working.add_argument("source", type=Path)
    working.add_argument("result", type=Path)
    showing, drawing = commands.add_parser("table"), commands.add_parser("plot")
    for command in (showing, drawing):
        command.add_argument("record", type=Path)
    drawing.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "run":
        run_all(options)
    elif options.command == "worker":
        work(options)
    else:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        if options.command == "table":
            print(table(record))
        else:
            draw(record, options.record.name, options.output)


if __name__ == "__main__":
    main()
