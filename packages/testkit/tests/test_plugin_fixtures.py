"""The plugin's fixtures, as tests that use them see them."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from flash_attention_registry import Registry, default_registry

pytest_plugins = ["pytester"]

SETUP = """
    import os
    import pytest
    import torch
    from torch.nn.attention import _registry as torchs
    from flash_attention_registry import default_registry
    from flash_attention_testkit import FakeHandle, FakeProvider
    request = default_registry().request
"""

OVERRIDE = """
    OP = "_scaled_dot_product_flash_attention_for_cpu"
    libraries = []

    def override():
        library = torch.library.Library("aten", "IMPL")
        library.impl(OP, lambda *args, **kwargs: None, "CPU", allow_override=True)
        libraries.append(library)
        return library
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


def test_the_reset_puts_torchs_own_registry_back(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SETUP
        + """
    before = dict(torchs._FLASH_ATTENTION_IMPLS)
    handle = FakeHandle()

    def test_first(flash_attention_registry_reset):
        torchs.register_flash_attention_impl("kit-theirs", register_fn=lambda: handle)
        torchs.register_flash_attention_impl("FA3", register_fn=lambda: None)
        torchs._FLASH_ATTENTION_IMPLS.pop("FA4")
        torchs.activate_flash_attention_impl("kit-theirs")
        assert flash_attention_registry_reset.current() == "torch:kit-theirs"

    def test_second():
        assert handle.removals == 1
        assert torchs._FLASH_ATTENTION_ACTIVE is None
        now = {name: torchs._FLASH_ATTENTION_IMPLS.get(name) for name in before}
        assert now == before
        assert "kit-theirs" not in torchs._FLASH_ATTENTION_IMPLS
    """
    )
    pytester.runpytest().assert_outcomes(passed=2)


def test_what_torch_registers_when_it_is_first_imported_stays(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
    import sys

    def test_first(flash_attention_registry_reset):
        assert "torch" not in sys.modules
        from torch.nn.attention import _registry as torchs
        torchs.register_flash_attention_impl("kit-theirs", register_fn=lambda: None)

    def test_second():
        from torch.nn.attention import _registry as torchs
        assert {"FA3", "FA4"} <= set(torchs._FLASH_ATTENTION_IMPLS)
        assert "kit-theirs" not in torchs._FLASH_ATTENTION_IMPLS
    """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


def test_the_reset_puts_back_what_the_environment_waits_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SETUP
        + """
    import flash_attention_registry
    from flash_attention_registry.sdpa import router

    awaited = []

    @pytest.fixture(scope="module", autouse=True)
    def pending():
        provider = FakeProvider("kit-gpu")
        provider.availability = flash_attention_registry.before_using_cuda
        provider.register()
        os.environ["FLASH_ATTENTION_IMPL"] = "kit-gpu"
        request.honour(router.await_first_call)
        assert request.pending == ("kit-gpu",)
        yield
        request.supersede()
        router.uninstall("cuda")
        del os.environ["FLASH_ATTENTION_IMPL"]

    def test_first(flash_attention_registry_reset):
        FakeProvider("kit-other").register()
        flash_attention_registry_reset.activate("kit-other")
        router._slots["cuda"].awaiting = None  # as if the first call had come
        assert request.pending == ()

    def test_second():
        assert request.pending == ("kit-gpu",)
        assert router._slots["cuda"].settle() is None
        assert default_registry().current() == "kit-gpu"
        default_registry().restore()
    """
    )
    pytester.runpytest().assert_outcomes(passed=2)


def test_what_a_test_leaves_pending_is_dropped(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SETUP
        + """
    def test_first(flash_attention_registry_reset, monkeypatch):
        from flash_attention_registry import before_using_cuda
        provider = FakeProvider("kit-gpu")
        provider.availability = before_using_cuda
        provider.register()
        monkeypatch.setenv("FLASH_ATTENTION_IMPL", "kit-gpu")
        request.honour(lambda *_: None)
        assert request.pending == ("kit-gpu",)

    def test_second():
        assert request.pending == ()
    """
    )
    pytester.runpytest().assert_outcomes(passed=2)


def test_a_kernel_left_at_torchs_ops_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SETUP
        + OVERRIDE
        + """
    def test_tidy(flash_attention_registry_reset):
        override()._destroy()

    def test_leaky(flash_attention_registry_reset):
        override()

    def test_not_of_this_test(flash_attention_registry_reset):
        pass

    def test_end():
        for library in libraries:
            library._destroy()
    """
    )
    result = pytester.runpytest()

    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_leaky*",
            "*still stands at aten::_scaled_dot_product_flash_attention_for_cpu on cpu; whoever*",
        ]
    )


def test_a_fresh_registry_is_its_own_and_sees_nothing_installed(
    fresh_flash_attention_registry: Registry, fake_entry_points
) -> None:
    from flash_attention_testkit import FakeProvider

    fake_entry_points.offer(FakeProvider("kit-offered"))
    assert "kit-offered" in Registry().names()

    assert fresh_flash_attention_registry.names() == []
    FakeProvider("kit-fake").register(fresh_flash_attention_registry)
    assert fresh_flash_attention_registry.names() == ["kit-fake"]
    assert "kit-fake" not in default_registry().names()


@pytest.mark.parametrize(
    "statement",
    ["import torch", "from torch import nn", "import torch.nn", "from torch.nn import Linear"],
)
def test_without_torch_no_import_of_it_succeeds(
    request: pytest.FixtureRequest, statement: str
) -> None:
    import torch.nn  # so that it would be found

    request.getfixturevalue("no_torch")

    with pytest.raises(ModuleNotFoundError, match="torch"):
        exec(statement, {})
    assert importlib.util.find_spec("torch") is None
    assert torch.nn is not None, "who has it keeps it"


def test_after_a_time_without_torch_all_modules_are_as_before() -> None:
    import torch

    from flash_attention_testkit._without_torch import without_torch

    before = dict(sys.modules)
    with pytest.raises(OSError, match="inside"), without_torch():
        raise OSError("inside")
    with without_torch():
        sys.modules["flash_attention_testkit.hidden"] = None  # as tests hide a module

    assert sys.modules["torch"] is torch
    assert sys.modules == before


def test_modules_first_imported_without_torch_are_forgotten(
    fake_entry_points, pytester: pytest.Pytester
) -> None:
    source = "try:\n    import torch\nexcept ModuleNotFoundError:\n    torch = None\n"
    pytester.makepyfile(kit_optional=source)
    pytester.mkpydir("kit_package").joinpath("part.py").write_text(source)
    pytester.makepyfile(
        """
    import kit_package
    import torch

    def test_first(no_torch):
        import kit_optional
        from kit_package import part
        assert kit_optional.torch is None
        assert part.torch is None

    def test_second():
        import kit_optional
        from kit_package import part
        assert kit_optional.torch is torch
        assert part.torch is torch
    """
    )
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_what_runs_the_test_may_load_parts_of_itself_without_torch(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
    import sys

    def test_first(no_torch):
        assert "_pytest.pytester_assertions" not in sys.modules
        import _pytest.pytester_assertions
        sys.kit_assertions = _pytest.pytester_assertions

    def test_second():
        import _pytest.pytester_assertions
        assert _pytest.pytester_assertions is sys.kit_assertions
    """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


def test_compiled_modules_first_imported_without_torch_stay(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
    import sys

    def test_first(no_torch):
        import numpy
        sys.kit_numpy = numpy

    def test_second():
        assert sys.modules["numpy"] is sys.kit_numpy
        assert "torch" not in sys.modules
        import numpy.random
    """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)
