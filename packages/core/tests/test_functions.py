"""The functions of the package act on the registry of the process."""

from __future__ import annotations

import doctest
import pickle
from importlib.metadata import version
from pathlib import Path

import pytest

import flash_attention_registry as package
from flash_attention_registry import errors


@pytest.fixture(autouse=True)
def as_before():
    """Whatever these tests do to the registry of the process is undone."""
    registry = package.default_registry()
    snapshot = registry.snapshot()
    yield
    registry.reset(snapshot)


def test_the_functions_act_on_the_default_registry(kernels):
    package.register_flash_attention_impl(
        "mine",
        register_fn=kernels.installer("mine"),
        family="mine only",
        priority=2,
        availability=lambda: None,
        recommended=lambda: None,
        prepare=lambda: None,
    )
    heard = []
    handle = package.add_transition_listener(lambda before, after: heard.append(after))
    assert "mine" in package.list_flash_attention_impls()
    package.activate_flash_attention_impl("mine only")
    assert package.current_flash_attention_impl() == "mine" == kernels.running
    assert package.default_registry().current() == "mine"
    report = {r.name: r for r in package.explain_flash_attention_impls()}["mine"]
    assert (report.family, report.priority, report.active) == ("mine only", 2, True)
    package.restore_flash_attention_impl()
    with package.use_flash_attention_impl("mine") as name:
        assert name == package.current_flash_attention_impl() == "mine"
    package.unregister_flash_attention_impl("mine")
    assert "mine" not in package.list_flash_attention_impls()
    assert heard == ["mine", None, "mine", None]
    handle.remove()


def test_warnings_point_at_the_line_that_called(kernels):
    with pytest.warns(package.RegistryWarning) as caught:
        package.restore_flash_attention_impl()
    assert Path(caught[0].filename) == Path(__file__)


def test_the_example_of_the_package_runs():
    namespace = {"__name__": "example"}
    parser = doctest.DocTestParser()
    example = parser.get_doctest(package.__doc__, namespace, "package", None, 0)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0


def test_everything_that_is_announced_exists_and_is_documented():
    assert package.__all__ == sorted(package.__all__, key=lambda name: (name[0].islower(), name))
    for name in package.__all__:
        assert getattr(package, name).__doc__
        assert name in dir(package)


def test_the_package_says_its_version():
    assert package.__version__ == version("flash-attention-registry")
    assert "__version__" in dir(package)


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'activate'"):
        _ = package.activate


ERRORS = {
    name: thing
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, errors.FlashAttentionRegistryError)
}


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS)
def test_errors_cross_a_process_border(kind):
    error = kind("what was asked, found, and what to do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "what was asked, found, and what to do"


def test_the_reasons_of_a_family_cross_a_process_border():
    error = errors.FamilyUnavailableError("none", {"a": "needs sm_90"})
    assert pickle.loads(pickle.dumps(error)).reasons == {"a": "needs sm_90"}


def test_an_error_without_text_can_be_shown():
    assert str(errors.NotRegisteredError()) == ""
    assert errors.describe(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_notes_are_kept_on_every_python():
    class Old:
        """An exception of Python 3.10, as far as notes go."""

    old = Old()
    errors.add_note(old, "first")
    errors.add_note(old, "second")
    new = ValueError()
    errors.add_note(new, "first")
    assert old.__notes__ == ["first", "second"]
    assert new.__notes__ == ["first"]


@pytest.mark.parametrize("ask", ["activate", "unregister"])
def test_what_is_no_name_is_said_with_the_names_that_there_are(registry, ask):
    registry.register("mine", register_fn=lambda: None)
    with pytest.raises(TypeError, match=r"named by a str, but \['mine'\] was given.*'mine'"):
        getattr(registry, ask)(["mine"])
