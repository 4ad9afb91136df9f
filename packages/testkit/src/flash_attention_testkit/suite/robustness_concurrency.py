"""Streams, graphs, threads and devices: kernels run where and when the caller says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._findings import assert_same
from flash_attention_testkit.suite._subject import Subject, call_of
from flash_attention_testkit.suite.robustness_base import (
    PACKED,
    masked,
    needs_cuda,
    problem,
    run,
    run_call,
)

TURNS = 8

_MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_left": 2, "window_right": 3},
}
SWAPPED = (((30, 35), (10, 70)), ((10, 70), (30, 35)))
"""Packed sequences, and the same in another order."""

dense_or_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


class ConcurrencyTests(ProviderTestsBase):
    """What is expected is what the same kernel set gives for the same inputs by themselves."""

    def test_threads_do_not_disturb_each_other(self, subject: Subject) -> None:
        """Two threads call the kernel set at once, each with its own problem."""
        problems = [_problem(subject, seed, size) for seed, size in enumerate((65, 97))]
        expected = [run(subject, inputs) for inputs in problems]
        ready = threading.Barrier(2)

        def work(inputs: SdpaInputs) -> list[dict[str, Tensor]]:
            ready.wait()
            return [run(subject, inputs) for _ in range(TURNS // 2)]

        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(work, problems))
        for inputs, results, right in zip(problems, found, expected, strict=True):
            for result in results:
                assert_same(result, right, inputs)

    def test_results_are_of_what_the_inputs_hold_now(self, subject: Subject) -> None:
        """Other numbers in the same tensors give other results: nothing is kept by address."""
        given, other = (problem(subject, seed=seed) for seed in range(2))
        expected = run(subject, other)
        run(subject, given)
        _copy(other, given)
        assert_same(run(subject, given), expected, other)

    @pytest.mark.parametrize("mask", ["causal", "window"])
    def test_masks_are_of_this_call(self, subject: Subject, mask: str) -> None:
        """Calls of one shape, masked or not, see what they should: no mask is kept by shape."""
        inputs = problem(subject, batch=1, heads=1, kv_heads=1, seq_q=70, seq_k=70, **_MASKS[mask])
        row, near = (
            (slice(0, 1), slice(0, 6)) if mask == "causal" else (slice(69, 70), slice(63, 70))
        )
        inputs.value[:, near] = 0.0
        inputs.grad_out[:, : row.start] = 0.0
        inputs.grad_out[:, row.stop :] = 0.0
        far = torch.ones(70, dtype=torch.bool, device=subject.device)
        far[near] = False
        plain = replace(inputs, options={})
        for number, of_this_call in enumerate((plain, inputs, plain)):
            found = run(subject, of_this_call)
            sees = {"out": bool(found["out"][:, row].any())}
            if "dv" in found:
                sees["dv"] = bool(found["dv"][:, far].any())
            for name, seen in sees.items():
                assert seen == (of_this_call is plain), (
                    f"{name} of call {number + 1} is that of the mask of another call"
                )

    def test_packed_sequences_are_of_this_call(self, subject: Subject) -> None:
        """The same two sequences the other way round: offsets are not kept by their number."""
        first, second = (33, 65), (70, 70)
        given = problem(subject, lengths=(first, second))
        other = problem(subject, lengths=(second, first))
        expected = run(subject, given)
        for name, length in zip(
            ("query", "key", "value", "grad_out"), (33, 65, 65, 33), strict=True
        ):
            tensor = getattr(given, name)
            getattr(other, name).copy_(torch.cat([tensor[length:], tensor[:length]]))
        ends = {"out": 33, "lse": 33, "dq": 33, "dk": 65, "dv": 65}
        for name, tensor in expected.items():
            axis = 1 if name == "lse" else 0
            expected[name] = tensor.roll(-ends[name], axis)
        assert_same(run(subject, other), expected, other)

    def test_packed_lengths_are_what_the_offsets_hold_now(self, subject: Subject) -> None:
        """Likewise for offsets: those of a batch of as many sequences and rows may be elsewhere."""
        given, other = (problem(subject, lengths=lengths) for lengths in SWAPPED)
        expected = run(subject, other)
        run(subject, given)
        _copy(other, given)
        for offsets, others in zip(_offsets(given), _offsets(other), strict=True):
            offsets.copy_(others)
        assert_same(run(subject, given), expected, other)

    def test_kernels_wait_for_what_their_stream_waits_for(self, subject: Subject) -> None:
        """A stream that is not the default one makes the inputs and is busy with it."""
        needs_cuda(subject)
        given, other = (problem(subject, seed=seed) for seed in range(2))
        expected = run(subject, other)
        run(subject, given)  # compiled
        stream = torch.cuda.Stream(subject.device)
        stream.wait_stream(torch.cuda.current_stream(subject.device))
        call = call_of(given)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            _copy(other, given)
            found = run_call(subject, call, given.grad_out)
        torch.cuda.synchronize(subject.device)
        assert_same(found, expected, other)

    def test_streams_do_not_disturb_each_other(self, subject: Subject) -> None:
        """Two streams at once, each with its own problem."""
        needs_cuda(subject)
        problems = [_problem(subject, seed, 1000) for seed in range(2)]
        expected = [run(subject, inputs) for inputs in problems]
        streams = [torch.cuda.Stream(subject.device) for _ in problems]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(subject.device))
        found: list[list[dict[str, Tensor]]] = [[], []]
        for _ in range(TURNS):
            for stream, inputs, results in zip(streams, problems, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(run_call(subject, call_of(inputs), inputs.grad_out))
        torch.cuda.synchronize(subject.device)
        for inputs, results, right in zip(problems, found, expected, strict=True):
            for result in results:
                assert_same(result, right, inputs)

    @dense_or_packed
    def test_graph_replays_with_changed_inputs(self, subject: Subject, packed: bool) -> None:
        """A captured call reads what its inputs hold when it is replayed."""
        needs_cuda(subject)
        static, other = (_problem(subject, seed, 333, packed=packed) for seed in range(2))
        expected = run(subject, other)
        graph, captured = _captured(subject, static)
        _copy(other, static)
        for _ in range(2):
            for tensor in captured.values():
                tensor.fill_(float("nan"))
            graph.replay()
            assert_same(captured, expected, other)

    def test_graphs_replay_at_once(self, subject: Subject) -> None:
        """Two captured calls on two streams share no scratch memory."""
        needs_cuda(subject)
        problems = [_problem(subject, seed, 1000) for seed in range(2)]
        expected = [run(subject, inputs) for inputs in problems]
        graphs = [_captured(subject, inputs) for inputs in problems]
        streams = [torch.cuda.Stream(subject.device) for _ in problems]
        torch.cuda.synchronize(subject.device)
        for _ in range(TURNS):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize(subject.device)
        for inputs, (_, captured), right in zip(problems, graphs, expected, strict=True):
            assert_same(captured, right, inputs)

    def test_a_second_device_gives_the_same(self, subject: Subject) -> None:
        """Called as the router calls, with the device of the tensors current."""
        needs_cuda(subject)
        if torch.cuda.device_count() < 2:
            pytest.skip("needs a second CUDA device")
        inputs = problem(subject)
        expected = run(subject, inputs)
        second = torch.device("cuda", 1)
        moved = _moved(inputs, lambda tensor: tensor.to(second))
        with torch.cuda.device(second):
            found = run(subject, moved)
        assert {tensor.device for tensor in found.values()} == {second}
        assert_same({name: x.to(subject.device) for name, x in found.items()}, expected, inputs)


def _problem(subject: Subject, seed: int, size: int, *, packed: bool = False) -> SdpaInputs:
    """Causal where that is declared."""
    options = masked(subject, causal=True)
    if packed:
        return problem(subject, seed=seed, lengths=PACKED, **options)
    batch = 2 if subject.device.type == "cuda" else 1
    return problem(subject, seed=seed, batch=batch, seq_q=size, seq_k=size, **options)


def _offsets(inputs: SdpaInputs) -> tuple[Tensor, Tensor]:
    query, key = inputs.options.get("cu_seqlens_query"), inputs.options.get("cu_seqlens_key")
    assert query is not None
    assert key is not None
    return query, key


def _captured(
    subject: Subject, inputs: SdpaInputs
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of one forward and backward of a problem, and what it writes."""
    call = call_of(inputs)  # asks the device for the longest sequence, which a capture forbids
    side = torch.cuda.Stream(subject.device)
    side.wait_stream(torch.cuda.current_stream(subject.device))
    with torch.cuda.stream(side):
        run_call(subject, call, inputs.grad_out)
    torch.cuda.current_stream(subject.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # From a capture that fails torch does not return to the stream of before: later tests would
    # run on its stream.
    with torch.cuda.stream(torch.cuda.current_stream(subject.device)), torch.cuda.graph(graph):
        results = run_call(subject, call, inputs.grad_out)
    return graph, results


def _moved(inputs: SdpaInputs, move: Callable[[Tensor], Tensor]) -> SdpaInputs:
    tensors = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    query, key, value, grad_out = map(move, tensors)
    return SdpaInputs(query, key, value, grad_out, inputs.options)


def _copy(source: SdpaInputs, target: SdpaInputs) -> None:
    for name in ("query", "key", "value", "grad_out"):
        getattr(target, name).copy_(getattr(source, name))
