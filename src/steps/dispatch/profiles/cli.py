"""`steps profiles`: list, show, check, init."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from steps.errors import ExecutorError, StepsError, UsageError, suggest

app = typer.Typer(
    help="Where jobs run: profiles of an env.toml, and the shipped ones.", no_args_is_help=True, rich_markup_mode=None
)

EnvFile = Annotated[
    str | None,
    typer.Option("--env-file", metavar="PATH", help="Profiles (default: $STEPS_ENV_FILE, env.toml upwards from here)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A profile, as `steps profiles list` shows it.", show_default=False)
]

#: Columns of a terminal that has room for everything about a profile in one line.
_WIDE = 130
#: `${oc.env:NAME}` or `${oc.env:NAME,''}`: no secret stands in it.
_FROM_SHELL = re.compile(r"\$\{oc\.env:\w+(,(''|\"\"|null))?\}")


@app.command("list")
def list_profiles(env_file: EnvFile = None, json: Json = False) -> None:
    """List the profiles: your own, then the shipped ones."""
    from steps.dispatch import profiles, render
    from steps.dispatch.profiles import env_files

    tables = env_files.tables(env_file)
    rows = [_row(name, tables) for name in profiles.names(tables)]
    if json:
        _print_json(rows)
        return
    header = ["NAME", "EXECUTOR", "EXTENDS", "FILE", "WHAT"]
    shown = [[row["name"], row["executor"] or "-", row["extends"] or "-", row["file"], _what(row)] for row in rows]
    if render.width() < _WIDE:  # what a profile extends, and where it stands, is for `show` then
        header, *shown = [[name, executor, what] for name, executor, _, _, what in (header, *shown)]
    _print(render.table(header, shown))


def _what(row: Mapping[str, Any]) -> str:
    """What there is to say about a profile, in one line."""
    if row["problem"]:
        return f"broken: {row['problem']}"
    return row["description"] or (f"extends {row['extends']}" if row["extends"] else "")


def _row(name: str, tables: Any) -> dict[str, Any]:
    from steps.dispatch import profiles

    table = tables.all[name]
    extends = table.values.get(profiles.EXTENDS)
    row = {"name": name, "executor": "", "extends": "" if extends is None else str(extends), "file": table.file}
    try:
        profile = profiles.assemble(name, tables)
    except ExecutorError as error:
        return {**row, "description": "", "problem": str(error)}
    return {**row, "executor": profile.executor, "description": profile.description, "problem": ""}


@app.command()
def show(name: Name = None, env_file: EnvFile = None, json: Json = False) -> None:
    """Show a profile, what it inherits, and where each value stands. Variables stay as they are written."""
    from steps.dispatch import profiles, render

    profile = profiles.load(_named(name, env_file, "show"), env_file)
    env = _without_secrets(profile.env)
    if json:
        _print_json({
            "name": profile.name, "executor": profile.executor, "description": profile.description,
            "chain": list(profile.chain), "env": env, "sources": dict(profile.sources),
        })  # fmt: skip
        return
    print(render.bold(profile.name) + (f"  {profile.description}" if profile.description else ""))
    print(f"made of {', '.join(profile.chain)}")
    print()
    _print(render.annotated(env, profile.sources))


def _named(name: str | None, env_file: str | None, command: str) -> str:
    """The name that was given. Raises UsageError with all there are where none was."""
    from steps.dispatch import profiles
    from steps.dispatch.profiles import env_files

    if name is None:
        known = ", ".join(profiles.names(env_files.tables(env_file)))
        raise UsageError(f"`steps profiles {command}` wants the name of a profile", hint=f"There are: {known}.")
    return name


def _without_secrets(env: Mapping[str, Any]) -> dict[str, Any]:
    """The values to show: a secret that somebody wrote down in the file is not shown again."""
    from steps.dispatch.job import MASK, is_secret

    variables = env.get("env_vars")
    if not isinstance(variables, Mapping):
        return dict(env)
    shown = {
        name: MASK if is_secret(name) and value and not _FROM_SHELL.fullmatch(str(value)) else value
        for name, value in variables.items()
    }
    return {**env, "env_vars": shown}


@app.command()
def check(name: Name = None, env_file: EnvFile = None) -> None:
    """Find what a job with this profile would stumble over. Asks here and on the cluster; exit code 5 if it would."""
    from steps.config.base import StepConfig
    from steps.config.validate import check_section, source_of
    from steps.dispatch import executors, profiles
    from steps.dispatch.compose import Composed, exposed_problems, settle, unfilled
    from steps.errors import ConfigError, Note

    profile = profiles.load(_named(name, env_file, "check"), env_file)
    executor = executors.get(profile.executor)
    composed = profile.environment or Composed({"run": {"env": {}}})
    problems = list(unfilled(composed))
    try:
        settle(composed)
    except ConfigError as error:
        problems += error.problems
    problems += exposed_problems(composed)
    if not problems:
        env, problems = check_section(executor.env, composed.data["run"]["env"], composed.sources, "run.env")
        if env is not None:
            problems = list(executor.check(StepConfig(), env))
        if env is not None and not problems:
            try:
                problems = list(executor.probe(env))
            except ExecutorError as error:
                problems = list(error.problems)
    sources = composed.sources
    told = [replace(each, source=each.source or source_of(each.where, sources)) for each in problems]
    for each in told:
        if isinstance(each, Note):
            print(f"note: {each}", flush=True)
    if faults := [each for each in told if not isinstance(each, Note)]:
        raise ExecutorError(faults)
    print(f"{profile.name} is ready")


@app.command()
def init(
    kind: Annotated[str, typer.Argument(metavar="slurm|lepton", help="What the profiles are for.")],
    path: Annotated[Path, typer.Argument(metavar="[PATH]", show_default=False, help="Default: env.toml.")] = Path(
        "env.toml"
    ),
) -> None:
    """Write an env.toml to start from, every value explained. Never overwrites."""
    from steps.dispatch.profiles import env_files

    starters = {file.stem: file for file in sorted((env_files.SHIPPED / "starters").glob("*.toml"))}
    if kind not in starters:
        hint = suggest(kind, starters) or f"There are: {', '.join(starters)}."
        raise UsageError(f"there is no starter for {kind!r}", hint=hint)
    if path.is_dir():
        path /= env_files.NAME
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starters[kind].read_text(encoding="utf-8"))
    except FileExistsError:
        hint = f"Name another: steps profiles init {kind} PATH. The text is in {starters[kind]}, to copy from."
        raise UsageError(f"{path} is there already, and stays as it is", hint=hint) from None
    except OSError as error:
        raise StepsError(f"{path} cannot be written: {error.strerror}") from error
    option = "" if _is_found(path) else f" --env-file {shlex.quote(str(path))}"
    profile = f"{kind}_peft_megatron_bridge"
    print(f"wrote {path}")
    print("Fill in what stands in <angle brackets>. Then:")
    print(f"  steps profiles check {profile}{option}")
    print(f"  steps run peft/megatron_bridge -b {profile}{option} --dry-run")


def _is_found(path: Path) -> bool:
    """Whether the file is read without being named."""
    from steps.dispatch.profiles import env_files

    try:
        found = env_files.own_file()
    except ExecutorError:  # $STEPS_ENV_FILE names a file that is not there
        return False
    return found is not None and found.resolve() == path.resolve()


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


def _print_json(data: object) -> None:
    import json

    print(json.dumps(data, indent=2))
