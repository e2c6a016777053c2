"""Every step folder keeps its promises: manifest, typed config, shipped YAML and code agree."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from steps import preflight
from steps.artifacts import graph
from steps.config.validate import fields
from steps.dispatch import catalog, executors
from steps.dispatch.compose import compose
from steps.dispatch.parameters import type_name
from steps.dispatch.plan import typed

STEPS = list(catalog.catalog().values())
CONFIGS = [(step, name) for step in STEPS for name in catalog.configs(step)]
SOURCE = Path(catalog.ROOT)


def ids(value):
    return getattr(value, "id", value)


def schema(step):
    return importlib.import_module(step.schema_module).Config


def test_the_catalog_covers_every_step_folder():
    folders = {path.parent for path in SOURCE.glob("*/*/step.py")} | {
        path.parent for path in SOURCE.glob("*/*/schema.py")
    }
    assert folders == {step.folder for step in STEPS}
    assert folders


@pytest.mark.parametrize("step", STEPS, ids=ids)
def test_a_step_folder_is_complete(step):
    for name in ("step.toml", "step.py", "schema.py", "README.md", "config/default.yaml", "config/tiny.yaml"):
        assert (step.folder / name).is_file(), name
    assert len((step.folder / "step.py").read_text().splitlines()) <= 90, "a step composes; the engine computes"


@pytest.mark.parametrize("step", STEPS, ids=ids)
def test_parameters_are_those_of_the_typed_config_with_the_same_defaults_and_choices(step):
    typed_fields = dict(fields(schema(step)))
    default = compose(step, "default").data
    for parameter in step.parameters:
        assert parameter.name in typed_fields, parameter.name
        info = typed_fields[parameter.name]
        value = preflight.lookup(default, parameter.name)
        if value is None and not info.is_required():
            value = info.get_default(call_default_factory=True)
        given = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        if given is not None:
            assert given == value, parameter.name
        if parameter.choices:
            assert " | ".join(map(str, parameter.choices)) == type_name(info.annotation), parameter.name
        assert parameter.description


@pytest.mark.parametrize("step", STEPS, ids=ids)
def test_ports_name_keys_of_the_typed_config(step):
    keys = dict(fields(schema(step)))
    for port in (*step.consumes, *step.produces):
        assert port.key in keys
        assert port.description


@pytest.mark.parametrize("step", STEPS, ids=ids)
def test_every_parameter_of_the_typed_config_is_described(step):
    assert [key for key, info in fields(schema(step)) if not info.description] == []


def file_of(module: str) -> Path | None:
    """The source of a module of this project; None for what is no module (a class, a function)."""
    path = SOURCE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which is not followed here"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == "steps"}


def reachable(*modules: str) -> set[Path]:
    """The files of `modules` and of all that these import, however far."""
    found, waiting = set(), list(modules)
    while waiting:
        file = file_of(waiting.pop())
        if file is not None and file not in found:
            found.add(file)
            waiting += imported(file)
    return found


def quoted(file: Path) -> set[str]:
    """The string constants of a file; comments and what stands inside longer texts are none."""
    return {node.value for node in ast.walk(parsed(file)) if isinstance(node, ast.Constant) and type(node.value) is str}


@pytest.mark.parametrize("step", STEPS, ids=ids)
def test_every_named_error_is_one_that_the_code_raises(step):
    """A missing_<type> comes from opening the artifact; any other name must stand in code that this step can reach."""
    # The dispatcher and the runtime open artifacts for every step.
    files = reachable(step.module, step.schema_module, "steps.preflight", "steps.artifacts.opening")
    assert not [file for file in files if "dispatch" in file.parts]
    names = set().union(*map(quoted, files))
    general = {f"missing_{port.type}" for port in step.consumes}
    for error in step.errors:
        assert error.name in general | names, error.name
        assert error.cause
        assert error.recovery


def test_an_error_of_another_step_is_not_taken_for_ones_own():
    """What the test above follows, and what not: packing cannot raise what only training does."""
    step = catalog.catalog()["data_prep/sft_packing"]
    files = reachable(step.module, step.schema_module)
    assert SOURCE / "engine/data/sft.py" in files
    assert SOURCE / "artifacts/opening.py" in files
    names = set().union(*map(quoted, files))
    assert "no_rows_left" in names
    assert not {"non_finite_loss", "base_model_mismatch", "run_mismatch"} & names


@pytest.mark.parametrize(("step", "name"), CONFIGS, ids=ids)
def test_every_shipped_config_composes_and_validates_without_any_environment_variable(step, name, monkeypatch):
    for variable in re.findall(r"oc\.env:(\w+)", (step.folder / "config" / f"{name}.yaml").read_text()):
        monkeypatch.delenv(variable, raising=False)
    typed(step, compose(step, name), executors.get("local"))


def test_the_tiny_configs_are_one_chain():
    """Whatever a tiny config consumes is a file of a package or what another tiny config produces."""
    produced = {}
    for step in STEPS:
        data = compose(step, "tiny").data
        for port in step.produces:
            produced[str(preflight.lookup(data, port.key))] = port.type
    for step in STEPS:
        data = compose(step, "tiny").data
        for port in step.consumes:
            value = preflight.lookup(data, port.key)
            if value is None:
                assert not port.required, (step.id, port.key)
                continue
            # A part of an artifact will do: the test split of the tweets.
            whole = next((str(path) for path in (Path(value), *Path(value).parents) if str(path) in produced), None)
            assert whole is not None or Path(value).is_file(), (step.id, port.key, value)
            if whole is not None:
                assert graph.is_a(produced[whole], port.type)


def test_schemas_are_free_of_torch():
    modules = [step.schema_module for step in STEPS]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "print([m for m in ('torch', 'transformers', 'nemo_run', 'pyarrow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
