"""Which file is read, how tables inherit, and what is refused with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.steps import fake_step

from steps.dispatch import catalog, profiles
from steps.dispatch.compose import compose
from steps.dispatch.interpolation import leaves
from steps.dispatch.plan import Place, prepare
from steps.dispatch.profiles import env_files
from steps.errors import ConfigError, ExecutorError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A project directory of its own, and nobody's variables."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name in (*env_files.VARIABLES, "USER"):
        monkeypatch.delenv(name, raising=False)


def write(text: str, name: str = "env.toml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(name: str | None, env_file: str | None = None) -> str:
    with pytest.raises(ExecutorError) as caught:
        profiles.load(name, env_file)
    return str(caught.value)


def slurm(time: str) -> str:
    return f'[p]\nexecutor = "slurm"\ntime = "{time}"\n'


# Which file


def test_the_file_named_first_wins(monkeypatch):
    for number, name in enumerate(("given.toml", "steps.toml", "nemotron.toml", "env.toml"), start=1):
        write(slurm(f"0{number}:00:00"), name)
    assert profiles.load("p").env["time"] == "04:00:00"
    monkeypatch.setenv("NEMOTRON_ENV_FILE", "nemotron.toml")
    assert profiles.load("p").env["time"] == "03:00:00"
    monkeypatch.setenv("STEPS_ENV_FILE", "steps.toml")
    assert profiles.load("p").env["time"] == "02:00:00"
    assert profiles.load("p", "given.toml").env["time"] == "01:00:00"
    monkeypatch.setenv("STEPS_ENV_FILE", "")
    assert profiles.load("p").env["time"] == "03:00:00"


def test_the_nearest_env_toml_upwards_up_to_the_top_of_the_project(tmp_path, monkeypatch):
    write(slurm("01:00:00"))
    deep = tmp_path / "project" / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    found = profiles.load("p")
    assert found.sources["time"] == "../../../env.toml [p]"
    (tmp_path / "project" / "env.toml").write_text(slurm("02:00:00"))
    (tmp_path / "project" / ".git").mkdir()
    assert profiles.load("p").env["time"] == "02:00:00"  # beside .git still counts
    (tmp_path / "project" / "env.toml").unlink()
    assert "there is no profile 'p'" in refused("p")  # above it does not


def test_without_a_profile_no_file_is_read(monkeypatch):
    write("this is no TOML")
    monkeypatch.setenv("STEPS_ENV_FILE", "nowhere.toml")
    assert profiles.load(None) == profiles.Profile("local")
    assert profiles.load(None).environment is None


def test_a_file_without_a_profile_may_describe_this_machine():
    write('[local]\nexecutor = "local"\nenv_vars = {A = "1"}\n', "given.toml")
    found = profiles.load(None, "given.toml")
    assert (found.executor, found.env["env_vars"]) == ("local", {"A": "1"})


@pytest.mark.parametrize("variable", [None, *env_files.VARIABLES])
def test_a_file_that_is_named_must_be_there(variable, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "nowhere.toml")
    message = refused("local", None if variable else "nowhere.toml")
    assert message.startswith(f"{'$' + variable if variable else '--env-file'} names nowhere.toml, which is not there")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[p]\nexecutor = "slurm"\ntime = \n', "env.toml:3:8: invalid value"),
        ('[p]\nmounts+ = ["/a:/a"]\n', 'A key with a + stands in quotes: "mounts+" = […]'),
        ("[p]\nexecutor = slurm\n", 'env.toml:2:12: invalid value. Text stands in quotes: name = "value".'),
        ('[p]\nexecutor = "slurm"\n[p]\n', "env.toml:3:"),
        ('[p]\nexecutor = "', "env.toml: "),
    ],
)
def test_what_is_no_toml_is_told_with_line_and_column(text, message):
    write(text)
    assert message in refused("p")


def test_a_file_that_is_no_text(tmp_path):
    Path("env.toml").write_bytes(b"[p]\nexecutor = '\xff'\n")
    assert refused("p") == "env.toml is not UTF-8 (byte 16)"
    assert "which is a directory" in refused("p", str(tmp_path))


# How tables inherit


def test_mappings_merge_lists_replace_and_a_plus_appends():
    write("""
[base]
executor = "slurm"
mounts = ["/a:/a"]
startup_commands = ["one"]
env_vars = {A = "1", B = "1"}
[middle]
extends = "base"
"mounts+" = ["/b:/b"]
startup_commands = ["two"]
env_vars = {B = "2"}
[p]
extends = "middle"
"mounts+" = ["/c:/c", "/d:/d"]
""")
    found = profiles.load("p")
    assert found.env == {
        "executor": "slurm",
        "mounts": ["/a:/a", "/b:/b", "/c:/c", "/d:/d"],
        "startup_commands": ["two"],
        "env_vars": {"A": "1", "B": "2"},
    }
    base, middle, mine = ("env.toml [base]", "env.toml [middle]", "env.toml [p]")
    assert found.sources == {
        "executor": base,
        "mounts": f"{base} + {middle} + {mine}",
        "mounts.0": base,
        "mounts.1": middle,
        "mounts.2": mine,
        "mounts.3": mine,
        "startup_commands": middle,
        "startup_commands.0": middle,
        "env_vars.A": base,
        "env_vars.B": middle,
    }
    assert found.chain == (mine, middle, base)


_names = st.sampled_from("abc")
_trees = st.dictionaries(
    _names,
    st.recursive(
        st.none() | st.lists(st.none(), max_size=3),
        lambda inner: st.dictionaries(_names, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def _numbered(tree, number: int):
    """Every leaf holds the number of its layer."""
    if isinstance(tree, dict):
        return {key: _numbered(value, number) for key, value in tree.items()}
    return [_numbered(item, number) for item in tree] if isinstance(tree, list) else number


@given(st.lists(_trees, min_size=1, max_size=4))
def test_inheritance_merges_as_omegaconf_does_and_knows_the_layer_of_every_value(trees):
    layers = [_numbered(tree, number) for number, tree in enumerate(trees)]
    try:
        expected = OmegaConf.to_container(OmegaConf.merge({"executor": 0}, *layers))
    except TypeError:  # it refuses a mapping over a list, which replaces here
        reject()
    tables = {"0": env_files.Table("0", "f", {"executor": 0, **layers[0]})}
    for number, layer in enumerate(layers[1:], start=1):
        tables[str(number)] = env_files.Table(str(number), "f", {**layer, "extends": str(number - 1)})
    found = profiles.assemble(str(len(layers) - 1), env_files.Tables(tables, {}))
    assert found.env == expected
    for path, number in leaves(found.env):
        assert found.sources[".".join(map(str, path))] == f"f [{number}]"


def test_an_own_profile_wins_and_shipped_ones_stand_on_it():
    write('[slurm_base]\nextends = "slurm_defaults"\naccount = "mine"\n')
    found = profiles.load("slurm_prep_sft_packing")
    assert found.env["account"] == "mine"
    assert found.env["container_image"]  # of slurm_defaults
    assert "host" not in found.env  # of the shipped slurm_base, which it replaces
    assert found.sources["account"] == "env.toml [slurm_base]"
    assert found.sources["pip_extras"] == "profiles/slurm.toml [slurm_prep_base]"


def test_where_each_value_came_from_reaches_the_configuration(tmp_path):
    write('[p]\nextends = "slurm_defaults"\n"mounts+" = ["/a:/a"]\nenv_vars = {A = "1"}\n')
    step = fake_step(tmp_path / "step", default="run:\n  env:\n    nodes: 1\n    mounts: [/x:/x]\n")
    for config in ("default", "bare"):
        (tmp_path / "step/config/bare.yaml").write_text("a: 1\n")
        sources = compose(step, config, [], profiles.load("p").environment).sources
        assert sources["run.env.mounts.0"] == "env.toml [p]"
        assert sources["run.env.env_vars.A"] == "env.toml [p]"
        assert sources["run.env.gpus_per_node"] == "profiles/slurm.toml [slurm_defaults]"


def test_a_time_without_quotes_is_the_text_it_looks_like():
    write('[p]\nexecutor = "slurm"\ntime = 02:30:00\nenv_vars = {DAY = 2026-01-31}\n')
    assert profiles.load("p").env["time"] == "02:30:00"
    assert profiles.load("p").env["env_vars"] == {"DAY": "2026-01-31"}


def test_a_description_is_nobodys_run_env():
    write('[base]\nexecutor = "slurm"\ndescription = "The base"\n[p]\nextends = "base"\ndescription = "Mine"\n')
    found = profiles.load("p")
    assert (found.description, dict(found.env)) == ("Mine", {"executor": "slurm"})


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[p]\nextends = "q"\n[q]\nextends = "p"\n',
            "env.toml [q]: `extends` goes round in a circle: p -> q -> p. One of them has to stand alone.",
        ),
        (
            '[slurm_base]\nextends = "slurm_base"\n[p]\nextends = "slurm_base"\n',
            "env.toml [slurm_base]: `extends` goes round in a circle: slurm_base -> slurm_base. Your own slurm_base "
            "takes the place of the shipped one, so nothing of yours can extend that: rename it, or "
            "extend slurm_defaults, as the shipped one does.",
        ),
        (
            '[slurm_base]\nextends = "slurm_cpu_base"\n[p]\nextends = "slurm_cpu_base"\n',
            "slurm_cpu_base -> slurm_base -> slurm_cpu_base. Your own slurm_base takes the place of the shipped one",
        ),
        (
            '[p]\nextends = "slurm_bas"\n',
            "env.toml [p]: extends 'slurm_bas', which is no profile. Did you mean slurm_base?",
        ),
        # The table itself is no suggestion.
        ('[p]\nextends = "loop"\n[loop]\nextends = "lop"\n', "extends 'lop', which is no profile\n"),
        ('[p]\nextends = ["slurm_base"]\n', "env.toml [p]: `extends` names one profile, got ['slurm_base']"),
        ('[pp]\nexecutor = "slurm"\n', "there is no profile 'p'. Did you mean"),
        ('[p]\nproject = "x"\n', "env.toml [p]: is no profile: it names no executor. Profiles have executor"),
        (
            '[wandb]\nproject = "x"\n[p]\nextends = "wandb"\n',
            "env.toml [p]: is no profile: it names no executor, and nothing that it extends does",
        ),
        (
            '[p]\nexecutor = "slrum"\n',
            "executor: there is no executor 'slrum' (from env.toml [p]). Did you mean slurm?",
        ),
        ('[p]\nexecutor = ["slurm"]\n', "executor: there is no executor \"['slurm']\" (from env.toml [p])"),
        ('[p]\nexecutor = "slurm"\ndescription = 5\n', "description: is one line of text (from env.toml [p])"),
        (
            '[p]\nexecutor = "slurm"\npartitoin = "x"\n',
            "partitoin: unknown key (from env.toml [p]). Did you mean partition?",
        ),
        (
            '[q]\nexecutor = "slurm"\nnodes = "two"\n[p]\nextends = "q"\n',
            "nodes: 'two' is not an integer (from env.toml [q])",
        ),
        (
            '[p]\nexecutor = "slurm"\ntunnel = "shh"\n',
            "tunnel: 'shh' is not one of the choices (from env.toml [p]). Allowed: local, ssh. Did you mean ssh?",
        ),
        ('[p]\nexecutor = "slurm"\ntime = "12 hours"\n', "time: '12 hours' is no time limit"),
        ('[p]\nexecutor = "slurm"\nnodes = 0\n', "nodes: 0 is out of range (from env.toml [p]). Allowed: >= 1"),
        (
            '[p]\nexecutor = "slurm"\n"nodes+" = ["x"]\nnodes = 1\n',
            "nodes+: appends to a list, but what it inherits is none (from env.toml [p])",
        ),
        ('[p]\nexecutor = "slurm"\n"mounts+" = "x"\n', "mounts+: appends to a list, but it is none"),
        ('[p]\nexecutor = "slurm"\nenv_vars = {"A B" = "1"}\n', "env_vars: 'A B' is no name"),
        ('[p]\nexecutor = "slurm"\nnode_group = "x"\n', "node_group: unknown key (from env.toml [p])"),
        (
            '[p]\nexecutor = "lepton"\nmounts = [{path = "/", mount_paht = "/x"}]\n',
            "mounts.0.mount_path: is required",
        ),
        ('[p]\nexecutor = "slurm"\npackager = "git"\n', "packager: has no meaning here (from env.toml [p]). Drop it"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, message):
    write(text)
    assert message in refused("p") + "\n"


def test_every_fault_at_once():
    write('[base]\nexecutor = "slurm"\nacount = "x"\n[p]\nextends = "base"\nnodes = "two"\nhots = "h"\n')
    with pytest.raises(ExecutorError) as caught:
        profiles.load("p")
    assert {(problem.where, problem.source) for problem in caught.value.problems} == {
        ("nodes", "env.toml [p]"),
        ("hots", "env.toml [p]"),
        ("acount", "env.toml [base]"),
    }


def test_a_part_of_a_name_is_enough_for_a_suggestion():
    assert "Did you mean slurm_convert_merge_lora or" not in refused("slurm_merge_lora")
    assert "Did you mean lepton_convert_merge_lora or slurm_convert_merge_lora?" in refused("merge_lora")
    assert "`steps profiles list` shows" in refused("xyzzy")


def test_variables_are_resolved_late_and_typed_then(tmp_path, monkeypatch):
    write("""
[p]
executor = "slurm"
nodes = "${oc.decode:${oc.env:NODES}}"
time = "${oc.env:LIMIT}"
tunnel = "${oc.env:TUNNEL,local}"
mounts = ["${oc.env:DATA}:/data"]
env_vars = {HF_TOKEN = "${oc.env:HF_TOKEN}"}
""")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = profiles.load("p")
    assert found.env["env_vars"]["HF_TOKEN"] == "${oc.env:HF_TOKEN}"
    for name, value in {"NODES": "2", "LIMIT": "12:00:00", "DATA": "/d", "HF_TOKEN": "t"}.items():
        monkeypatch.setenv(name, value)
    data = compose(fake_step(tmp_path / "step", default="a: 1\n"), "default", [], found.environment).data["run"]["env"]
    assert (data["nodes"], data["time"], data["tunnel"], data["mounts"]) == (2, "12:00:00", "local", ["/d:/data"])


def test_the_secrets_of_a_profile_are_refused_where_they_would_be_seen(monkeypatch):
    write("""
[p]
executor = "slurm"
comment = "${oc.env:DB_PASSWORD}"
time = "${oc.env:DB_PASSWORD}"
startup_commands = ["login ${oc.env:DB_PASSWORD}"]
""")
    monkeypatch.setenv("DB_PASSWORD", "hush")
    with pytest.raises(ConfigError) as caught:
        prepare(catalog.find("data_prep/demo_chat"), "tiny", place=Place("p"))
    told = str(caught.value)
    assert "hush" not in told
    assert [line.partition(":")[0] for line in told.splitlines()] == [
        "run.env.comment", "run.env.time", "run.env.startup_commands.0",
    ]  # fmt: skip
    assert told.splitlines()[0].endswith(
        "holds a secret (DB_PASSWORD), and the configuration is written to the job's directory (from env.toml [p]). "
        'Pass it as run.env.env_vars.DB_PASSWORD, and use "$DB_PASSWORD" in a command.'
    )


def test_a_starter_as_it_is_refuses_a_run_with_every_placeholder_at_once():
    starter = (env_files.SHIPPED / "starters" / "lepton.toml").read_text()
    write(starter)
    blanks = re.findall(r'^(?!#).*"(<[^<>]+>)"', starter, re.MULTILINE)
    with pytest.raises(ExecutorError) as caught:
        prepare(catalog.find("peft/megatron_bridge"), "default", place=Place("lepton_peft_megatron_bridge"))
    assert [problem.what for problem in caught.value.problems] == [f"{it} is still to be filled in" for it in blanks]


def test_a_placeholder_has_no_type_before_it_is_filled_in():
    write('[p]\nexecutor = "slurm"\ntime = "<hours>"\nnodes = "<how many>"\n')
    assert profiles.load("p").env["time"] == "<hours>"
