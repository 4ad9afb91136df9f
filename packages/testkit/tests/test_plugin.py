from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from flash_attention_registry import default_registry

pytest_plugins = ["pytester"]

PROVIDER = """
    import pytest
    from flash_attention_registry import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        list_flash_attention_impls,
        register_flash_attention_impl,
    )

    class Handle:
        def __init__(self, name, log, broken=False):
            self.name, self.log, self.broken = name, log, broken

        def remove(self):
            if self.broken:
                raise OSError("stuck")
            self.log.append(self.name)

    REMOVED = []

    def activate(name, broken=False):
        register_flash_attention_impl(name, register_fn=lambda: Handle(name, REMOVED, broken))
        activate_flash_attention_impl(name)
"""


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """In inner runs the second test sees what the first has left, and all share one ``sdpa``."""
    importlib.import_module("flash_attention_registry.sdpa")  # else each run has one of its own
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:randomly")
    return pytester


@pytest.fixture(autouse=True)
def _nothing_leaves_the_inner_runs():
    """Inner pytest runs share this process's registry."""
    registry = default_registry()
    before = registry.snapshot()
    yield
    registry.reset(before)


def test_what_a_test_activates_is_removed_after_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    def test_first(flash_attention_registry_reset):
        activate("kit-a")
        activate("kit-b")
        assert flash_attention_registry_reset.current() == "kit-b"

    def test_second():
        assert current_flash_attention_impl() is None
        assert REMOVED == ["kit-a", "kit-b"]
        assert not {"kit-a", "kit-b"} & set(list_flash_attention_impls())
    """
    )
    pytester.runpytest().assert_outcomes(passed=2)


def test_a_failing_test_is_cleaned_up_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    def test_first(flash_attention_registry_reset):
        activate("kit-a")
        raise RuntimeError

    def test_second():
        assert current_flash_attention_impl() is None
        assert REMOVED == ["kit-a"]
    """
    )
    pytester.runpytest().assert_outcomes(passed=1, failed=1)


def test_what_was_active_before_is_active_again(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    def test_first():
        activate("kit-outer")

    def test_second(flash_attention_registry_reset):
        activate("kit-inner")

    def test_third():
        assert current_flash_attention_impl() == "kit-outer"
        assert REMOVED == ["kit-outer", "kit-inner"]
    """
    )
    pytester.runpytest().assert_outcomes(passed=3)


def test_an_implementation_that_cannot_be_removed_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    def test_first(flash_attention_registry_reset):
        activate("kit-broken", broken=True)

    def test_second():
        assert current_flash_attention_impl() is None
        assert "kit-broken" not in list_flash_attention_impls()
    """
    )
    result = pytester.runpytest()

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*RestoreError*kit-broken*"])


def test_activation_during_the_reset_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    def test_first(flash_attention_registry_reset, monkeypatch):
        registry = flash_attention_registry_reset
        reset = registry.reset
        def reset_then_activate(snapshot):
            reset(snapshot)
            activate("kit-late")
        registry.reset = reset_then_activate

    def test_second():
        from flash_attention_registry import default_registry
        del default_registry().reset
    """
    )
    result = pytester.runpytest()

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*'kit-late' is active after the test, None was before*"])


def test_kernels_left_behind_torchs_ops_are_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PROVIDER
        + """
    import torch
    from flash_attention_registry import sdpa

    class Kernels:
        name = "kit-kernels"
        capabilities = sdpa.Capabilities(
            device_types=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32}),
            head_dims=range(8, 65, 8),
            features=frozenset(),
            deterministic="always",
        )

        def supports(self, call):
            return "never serves"

        def forward(self, call):
            raise NotImplementedError

        def backward(self, call, grad_out, out, lse):
            raise NotImplementedError

    leaked = []

    def leaky():
        leaked.append(sdpa.install(Kernels(), device_type="cpu"))
        return Handle("kit-leaky", REMOVED)

    def tidy():
        return sdpa.install(Kernels(), device_type="cpu")

    @pytest.mark.parametrize("register_fn", [tidy, leaky])
    def test_kernels(flash_attention_registry_reset, register_fn):
        register_flash_attention_impl("kit-leaky", register_fn=register_fn)
        activate_flash_attention_impl("kit-leaky")
        torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 1, 8, 8)] * 3)

    def test_end():
        leaked[0].remove()
        sdpa.uninstall("cpu")
    """
    )
    result = pytester.runpytest()

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_kernels[[]leaky[]]*",
            "*still served by kit-kernels on cpu; the handle that register_fn returned must*",
        ]
    )


GPU_TEST = "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"


def test_a_gpu_test_without_torch_is_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    pytester.makepyfile(GPU_TEST)
    result = pytester.runpytest_inprocess("--strict-markers", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs torch, which is not installed*"])


@pytest.mark.parametrize(
    ("devices", "interpreted", "outcome", "reason"),
    [
        (True, "0", {"passed": 1}, None),
        (True, "1", {"skipped": 1}, "*pytest -m gpu*"),
        (True, "True", {"skipped": 1}, "*pytest -m gpu*"),
        (True, "yes", {"skipped": 1}, "*pytest -m gpu*"),
        (True, "on", {"skipped": 1}, "*pytest -m gpu*"),
        (True, "Y", {"skipped": 1}, "*pytest -m gpu*"),
        (False, "0", {"skipped": 1}, "*needs a CUDA device*"),
    ],
)
def test_a_gpu_test_runs_where_it_can_and_is_skipped_with_the_reason_elsewhere(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    devices: bool,
    interpreted: str,
    outcome: dict[str, int],
    reason: str | None,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    pytester.makepyfile(GPU_TEST)
    result = pytester.runpytest_inprocess("--strict-markers", "-rs")
    result.assert_outcomes(**outcome)
    if reason is not None:
        result.stdout.fnmatch_lines([reason])


def test_the_plugin_costs_a_run_without_attention_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            assert "flash_attention_testkit.plugin" in sys.modules
            heavy = {"torch", "numpy", "triton", "flash_attention_registry"}
            assert not heavy & set(sys.modules)

        def test_fixture(flash_attention_registry_reset):
            assert flash_attention_registry_reset.current() is None
            assert "torch" not in sys.modules
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, flash_attention_testkit; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_every_public_name_is_there() -> None:
    code = """
import flash_attention_testkit as kit
assert set(kit.__all__) <= set(dir(kit))
print(sum(getattr(kit, name) is not None for name in kit.__all__) == len(kit.__all__))
try:
    kit.nothing
except AttributeError as error:
    print(error)
"""
    answers = run_python(code).splitlines()
    assert answers == ["True", "module 'flash_attention_testkit' has no attribute 'nothing'"]


def test_version_is_that_of_the_distribution() -> None:
    code = (
        "import sys, flash_attention_testkit as kit; print(kit.__version__, 'torch' in sys.modules)"
    )
    version = importlib.metadata.version("flash-attention-testkit")
    assert run_python(code).split() == [version, "False"]


def test_without_torch_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
import flash_attention_testkit
try:
    flash_attention_testkit.reference_sdpa
except ModuleNotFoundError as error:
    print(error)
"""
    answer = run_python(code)
    assert "flash_attention_testkit.reference_sdpa needs torch" in answer
    assert 'pip install "flash-attention-testkit[torch]"' in answer
