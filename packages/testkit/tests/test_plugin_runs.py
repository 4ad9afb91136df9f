"""The plugin in whole pytest runs: what it costs, and in company of other plugins and modes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
    import pytest
    import torch
    from flash_attention_registry import current_flash_attention_impl
    from flash_attention_testkit import FakeProvider, case_grid, make_inputs

    @pytest.mark.parametrize("case", case_grid("quick")[:4], ids=str)
    def test_case(case):
        assert make_inputs(case, 0).query.dtype == case.dtype

    @pytest.mark.parametrize("name", ["kit-a", "kit-b"])
    def test_reset(flash_attention_registry_reset, name):
        assert current_flash_attention_impl() is None
        FakeProvider(name).register()
        flash_attention_registry_reset.activate(name)

    def test_offered(fresh_flash_attention_registry, fake_entry_points):
        fake_entry_points.offer(FakeProvider("kit"), registry=fresh_flash_attention_registry)
        assert fresh_flash_attention_registry.names() == []

    def test_hidden(no_torch):
        with pytest.raises(ModuleNotFoundError):
            import torch

    @pytest.mark.gpu
    def test_gpu():
        assert torch.cuda.is_available()
"""


@pytest.mark.parametrize(
    "arguments",
    [["-n", "2"], ["-p", "no:randomly"], ["--import-mode=importlib"]],
    ids=["xdist", "no randomly", "importlib"],
)
def test_fixtures_and_cases_serve_any_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    # Two files of one name, which --import-mode=importlib allows.
    folders = ["first", "second"] if "importlib" in arguments[-1] else ["first"]
    pytester.makepyfile(**{f"{folder}/test_kit": TESTS for folder in folders})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    result = pytester.runpytest_subprocess("--strict-markers", *arguments)

    result.assert_outcomes(passed=8 * len(folders), skipped=len(folders))
    assert ("2 workers" in result.stdout.str()) is (arguments[0] == "-n")


TIMED = """
import importlib.metadata, time
import pytest

load = importlib.metadata.EntryPoint.load

def timed(entry_point):
    start = time.process_time()
    plugin = load(entry_point)
    if entry_point.value == "flash_attention_testkit.plugin":
        print("milliseconds:", 1e3 * (time.process_time() - start))
    return plugin

importlib.metadata.EntryPoint.load = timed
raise SystemExit(pytest.main(["-q"]))
"""


def test_a_run_that_does_not_use_the_plugin_pays_less_than_30_ms(tmp_path: Path) -> None:
    tmp_path.joinpath("test_nothing.py").write_text("def test_nothing():\n    pass\n")

    def milliseconds() -> float:
        """The processor time that importing the plugin takes in a run, with all it imports."""
        command = [sys.executable, "-c", TIMED]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("milliseconds:")]
        return float(line.split()[1])

    # The least of several, because a busy machine adds to processor time too.
    assert min(milliseconds() for _ in range(3)) < 30
