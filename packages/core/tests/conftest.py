"""A pretend dispatcher, a registry of its own per test, and distributions that can be installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from flash_attention_registry import (
    Registry,
    before_using_cuda,
    default,
    environment,
    torch_state,
)
from flash_attention_registry.discovery import ENTRY_POINT_GROUP, Discovery


class Library:
    """Kernels that somebody installed; they run until they are removed or freed."""

    def __init__(self, kernels: Kernels, name: str) -> None:
        self.kernels = kernels
        self.name = name
        kernels.installed.append(name)

    def remove(self) -> None:
        self.kernels.removals.append(self.name)
        self.kernels.installed.remove(self.name)


class Kernels:
    """What is installed, the newest last; stock kernels run where nothing is."""

    def __init__(self) -> None:
        self.installed: list[str] = []
        self.removals: list[str] = []

    @property
    def running(self) -> str:
        return self.installed[-1] if self.installed else "stock"

    def installer(self, name: str) -> Callable[[], Library]:
        """A `register_fn` that installs kernels of that name."""
        return lambda: Library(self, name)

    def installer_without_handle(self, name: str) -> Callable[[], None]:
        return lambda: self.installed.append(name)

    def installer_with_stuck_handle(self, name: str, error: BaseException) -> Callable[[], Library]:
        class Stuck(Library):
            def remove(self) -> None:
                raise error

        return lambda: Stuck(self, name)


class TorchsRegistry(types.ModuleType):
    """Stands in for torch's, as 2.11 to 2.13 behave: restore first, then look the name up."""

    def __init__(self):
        super().__init__(torch_state.MODULE)
        self._FLASH_ATTENTION_IMPLS = {}
        self._FLASH_ATTENTION_ACTIVE = None

    def register_flash_attention_impl(self, impl, *, register_fn):
        self._FLASH_ATTENTION_IMPLS[impl] = register_fn

    def activate_flash_attention_impl(self, impl):
        self.restore_flash_attention_impl()
        if impl not in self._FLASH_ATTENTION_IMPLS:
            raise ValueError(f"Unknown flash attention impl '{impl}'")
        handle = self._FLASH_ATTENTION_IMPLS[impl]()
        if handle is not None:
            self._FLASH_ATTENTION_ACTIVE = (impl, handle)

    def restore_flash_attention_impl(self):
        handle = None
        if self._FLASH_ATTENTION_ACTIVE is not None:
            handle = self._FLASH_ATTENTION_ACTIVE[1]
        if handle is not None:
            handle.remove()
        self._FLASH_ATTENTION_ACTIVE = None

    def current(self):
        return None if self._FLASH_ATTENTION_ACTIVE is None else self._FLASH_ATTENTION_ACTIVE[0]


class FailsAfter:
    """A callable that calls another one, and raises from a given call on."""

    def __init__(self, calls: int, then: Callable[[], object], error: BaseException) -> None:
        self.calls = calls
        self.then = then
        self.error = error

    def __call__(self) -> object:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.then()


def fail(error: BaseException) -> Callable[[], object]:
    """A callable that raises `error`, whatever it is given."""

    def failing(*_: object) -> object:
        raise error

    return failing


@pytest.fixture(autouse=True)
def _environment_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (environment.IMPL, environment.STRICT, environment.DISABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the environment asks for: `asked("a,b", strict="1")`."""

    def ask(impl: str, *, strict: str = "") -> None:
        monkeypatch.setenv(environment.IMPL, impl)
        monkeypatch.setenv(environment.STRICT, strict)

    return ask


@pytest.fixture
def kernels_type() -> type[Kernels]:
    return Kernels


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def torchs_registry_type() -> type[TorchsRegistry]:
    return TorchsRegistry


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> TorchsRegistry:
    """Torch's registry, in the place of the one of an imported torch."""
    module = TorchsRegistry()
    monkeypatch.setitem(sys.modules, torch_state.MODULE, module)
    return module


@pytest.fixture
def registry() -> Registry:
    """A registry that sees no installed provider."""
    return Registry(Discovery(prefix="nothing.is.declared.in.such.a.group"))


@pytest.fixture
def ab(registry: Registry, kernels: Kernels) -> Registry:
    """A registry with the implementations `a`, which is active, and `b`."""
    for name in "ab":
        registry.register(name, register_fn=kernels.installer(name))
    registry.activate("a")
    return registry


@pytest.fixture
def abc(registry: Registry, kernels: Kernels) -> Registry:
    """A registry with `a`, `b` and `c`, which needs CUDA for its check; nothing is active."""
    for name in "abc":
        check = before_using_cuda if name == "c" else None
        registry.register(name, register_fn=kernels.installer(name), availability=check)
    return registry


@pytest.fixture
def failing() -> Callable[[BaseException], Callable[[], object]]:
    return fail


@pytest.fixture
def fails_after() -> type[FailsAfter]:
    return FailsAfter


class Site:
    """A folder on `sys.path` into which distributions are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(
        self,
        module: str,
        source: str,
        *,
        provides: dict[str, str],
        distribution: str | None = "some-dist",
        version: str = "1.2.3",
    ) -> None:
        """Install a module, and a distribution whose entry points are `provides`."""
        (self.folder / f"{module}.py").write_text(source)
        self.modules.append(module)
        info = self.folder / f"{module}-0.dist-info"
        info.mkdir()
        lines = [f"[{ENTRY_POINT_GROUP}]", *(f"{k} = {v}" for k, v in provides.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        if distribution is not None:
            text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            (info / "METADATA").write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A place for distributions that is gone after the test, modules included."""
    monkeypatch.syspath_prepend(str(tmp_path))
    site = Site(tmp_path)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def installed(site, monkeypatch):
    """A registry, in the place of the process's own, that sees what is installed into `site`."""
    registry = Registry()
    monkeypatch.setattr(default, "_registry", registry)
    assert default.default_registry() is registry
    return registry


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution that has entry points in any groups, and no modules."""

    def declare(
        distribution: str,
        groups: dict[str, dict[str, str]],
        *,
        version: str = "1.0",
        folder: str = ".",
    ) -> None:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(str(place))
        info = place / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
        lines = []
        for group, points in groups.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    return declare
