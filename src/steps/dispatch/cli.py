"""The command line: list, show, run; params, jobs and profiles are in files of their own. The only place that prints
an error and ends the process."""

import gc
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from steps import __version__
from steps.dispatch import complete
from steps.errors import StepsError, UsageError, understand

app = typer.Typer(
    name="steps",
    help="Run the steps of an LLM fine-tuning pipeline, here or on a cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: What stood behind `--`. Typer would mix it with the overrides, so `main` takes it off before.
_passthrough: tuple[str, ...] = ()

StepId = Annotated[str, typer.Argument(metavar="ID", help="Step id or its tail.", autocompletion=complete.step_ids)]
EnvFile = Annotated[
    str | None,
    typer.Option("--env-file", metavar="PATH", help="Profiles (default: $STEPS_ENV_FILE, env.toml upwards from here)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> NoReturn:
    """The console script `steps`."""
    global _passthrough
    # Nothing lives long enough here to be collected, and no pydantic plugin belongs here: a quarter of the CPU time.
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    arguments = sys.argv[1:]
    if "--" in arguments:
        at = arguments.index("--")
        arguments, _passthrough = arguments[:at], tuple(arguments[at + 1 :])
    # Closed by whoever started us (`steps list >&-`): then nobody reads.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123, for the whole process
    sys.stderr = sys.stderr or sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows only ASCII shows what it can
    if _passthrough and arguments[:1] != ["run"]:
        _fail(UsageError(f"only `run` takes arguments behind --, got {' '.join(_passthrough)!r}"))
    if arguments[:1] not in (["run"], ["list"], ["show"]):
        add_groups()
    try:
        code = app(args=arguments, prog_name="steps", standalone_mode=False)  # 130 after Ctrl-C, which typer takes
    except StepsError as error:
        _fail(error)
    except BrokenPipeError:  # `steps list | head`: nobody reads on, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's own: an unknown option, a missing argument
            error.show()
            raise SystemExit(error.exit_code) from None
        _fail(understand(error, "--debug" in arguments))
    raise SystemExit(code or 0)


def add_groups() -> None:
    """Add `params`, `jobs` and `profiles`. Apart, since typer builds every option of every command it knows at each
    start."""
    from steps.dispatch import params
    from steps.dispatch.jobs import cli as jobs_cli
    from steps.dispatch.profiles import cli as profiles_cli

    app.command("params")(params.params)
    app.add_typer(jobs_cli.app, name="jobs")
    app.add_typer(profiles_cli.app, name="profiles")


def _fail(error: StepsError) -> NoReturn:
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def _version(asked: bool) -> None:
    if asked:
        print(f"steps {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_steps(
    category: Annotated[str | None, typer.Option(help="Only this category.")] = None,
    consumes: Annotated[str | None, typer.Option(help="Only steps that take this artifact type.")] = None,
    produces: Annotated[str | None, typer.Option(help="Only steps that make this artifact type.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only steps with this tag.")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="By category, with the artifacts that flow.")] = False,
    json: Json = False,
) -> None:
    """List the steps."""
    from steps.dispatch import catalog, render

    steps = catalog.select(category=category, consumes=consumes, produces=produces, tag=tag)
    if json:
        _print_json([render.step_json(step) for step in steps])
    elif not steps:
        print("no step fits all of these filters", file=sys.stderr)
    else:
        _print(render.step_tree(steps) if tree else render.step_list(steps))


@app.command()
def show(
    step: Annotated[
        str,
        typer.Argument(
            metavar="ID|PATH",
            help="Step id or its tail, or the directory of an artifact.",
            autocompletion=complete.step_ids,
        ),
    ],
    json: Json = False,
) -> None:
    """Show a step (artifacts, parameters, configs, errors), or an artifact: what it is, and where it came from."""
    from steps.dispatch import catalog, render

    if catalog.is_path(step):
        from steps.dispatch import artifact_page

        artifact = artifact_page.artifact(step)
        if json:
            _print_json(artifact_page.artifact_json(artifact))
        else:
            _print(artifact_page.artifact_page(artifact))
        return
    from steps.dispatch.parameters import parameters

    try:
        found = catalog.find(step)
    except UsageError as error:
        (problem,) = error.problems
        raise UsageError(f"{problem.what}, and nothing of that name here", hint=problem.hint) from None
    rows = parameters(found)
    if json:
        _print_json({**render.step_json(found), "config": rows})
    else:
        _print(render.step_page(found, rows))


@app.command()
def run(
    step: StepId,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... [-- PASSTHROUGH...]",
            help="Overrides (key=value, +new=value, ~deleted); behind --, arguments for the step itself.",
            autocompletion=complete.overrides,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            "--config", "-c", metavar="NAME|PATH", help="Shipped config or YAML file.", autocompletion=complete.configs
        ),
    ] = "default",
    attached: Annotated[
        str | None,
        typer.Option("--run", "-r", metavar="PROFILE", help="Run with this profile and stay until the end."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", "-b", metavar="PROFILE", help="Submit with this profile and return at once."),
    ] = None,
    env_file: EnvFile = None,
    after: Annotated[
        list[str] | None, typer.Option("--after", metavar="JOB", help="Start when this job has succeeded; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-d", help="Do everything but run.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Try a few steps of it here, and tell speed, memory and the time it takes.")
    ] = False,
    force_squash: Annotated[
        bool, typer.Option("--force-squash", help="Import the container image on the cluster anew.")
    ] = False,
    upstream: Annotated[
        bool, typer.Option("--upstream", help="First run the steps that make what is missing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a step, here or through a profile."""
    from steps.dispatch import catalog, launch

    launch.run(
        catalog.find(step),
        launch.Request(
            config=config, overrides=tuple(overrides or ()), passthrough=_passthrough, attached=attached, batch=batch,
            env_file=env_file, after=tuple(after or ()), dry_run=dry_run, probe=probe,
            force_squash=force_squash, upstream=upstream, json=json, debug=debug,
        ),
    )  # fmt: skip


def _print(lines: object) -> None:
    for line in lines:  # type: ignore[attr-defined]
        print(line)


def _print_json(data: object) -> None:
    import json

    print(json.dumps(data, indent=2, default=str))
