"""The command: the only place that prints, reads arguments and picks exit codes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servebench.errors import LaunchError, ProfileError, ServebenchError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from servebench.launcher import Launcher, RunningServer

_EXIT_FAILURE, _EXIT_BAD_INPUT, _EXIT_INTERRUPTED = 1, 2, 130
_EXIT_CODES = """
\b
Exit codes of run and report:
  0  PASS: every constraint holds, with enough queries to say so
  1  the run could not be carried out (server, host or servebench itself)
  2  bad input; nothing was started or overwritten
  3  FAIL: a constraint is broken
  4  INCONCLUSIVE: not enough queries; the report says how many more
  5  INVALID: the measurement cannot be trusted; the report says why
  130  interrupted; a partial run directory is complete as far as it goes
"""

_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key of the profile, e.g. --set load.target_qps=300. Repeatable; values are YAML.",
)
_profile_argument = click.argument("profile", metavar="PROFILE")


class _Group(click.Group):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ServebenchError as error:
            if isinstance(error, LaunchError) and error.log_tail:
                click.echo("\n".join(f"  | {line}" for line in error.log_tail.splitlines()), err=True)
            click.echo(f"servebench: error: {error}", err=True)
            ctx.exit(_EXIT_BAD_INPUT if isinstance(error, ProfileError) else _EXIT_FAILURE)
        except KeyboardInterrupt:
            click.echo("servebench: interrupted", err=True)
            ctx.exit(_EXIT_INTERRUPTED)


@click.group(cls=_Group, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="servebench", message="%(prog)s %(version)s")
def main() -> None:
    """Load-test a model server with Poisson traffic and judge its tail latency, truthfully.

    \b
    Start here:
      servebench run digits-triton-http            host a model on a real Triton and test it
      servebench run my-profile.yaml               your own server, payloads and promises
      servebench run PROFILE --set load.target_qps=300
      servebench report runs/DIR                   judge a finished run again
    """


@main.command(short_help="Run a load profile and judge the result.")
@_profile_argument
@_set_option
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to make (default: runs/PROFILE-TIME).")
@click.option("--json", "as_json", is_flag=True, help="Print the run document (run.json) instead of the report.")
@click.pass_context
def run(ctx: click.Context, profile: str, overrides: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Run PROFILE and judge the result.

    PROFILE is a YAML file or the name of a bundled profile. Queries arrive as a Poisson
    process at load.target_qps whatever the server does; each one's response time counts from
    when it was due. The run directory holds every query's times and all reports.
    """
    from servebench.engine.run import run_profile
    from servebench.profile import load_profile
    from servebench.report.live import LiveView

    loaded = load_profile(profile, overrides)
    directory = out or _default_directory(loaded.name)
    with LiveView() as view:
        state = run_profile(loaded, directory, command=["servebench", *_public(sys.argv[1:])], observer=view)
    code = _report(directory, as_json=as_json)
    ctx.exit(_EXIT_INTERRUPTED if state == "interrupted" else code)


@main.command(short_help="Judge a run directory again, without a server.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the run document (run.json) instead of the report.")
@click.pass_context
def report(ctx: click.Context, directory: Path, as_json: bool) -> None:
    """Recompute run.json and the latency files of DIRECTORY from its records, and print the report.

    Works on finished runs, and on what an interrupted or killed run left behind.
    """
    from servebench.record.rundir import FACTS, is_running

    if directory.is_file():
        raise ProfileError(f"{directory}: is a file; give the run's directory: {directory.parent}")
    if not directory.is_dir():
        raise ProfileError(f"{directory}: no such directory")
    runs = [] if (directory / FACTS).exists() else sorted(directory.glob(f"*/{FACTS}"), key=lambda facts: facts.stat().st_mtime)
    if runs:
        raise ProfileError(f"{directory}: not a run directory, but one of runs; the newest is {runs[-1].parent}")
    if is_running(directory):
        raise ProfileError(f"{directory}: its run is still going on")
    ctx.exit(_report(directory, as_json=as_json))


@main.command(short_help="Preview a profile's arrivals without sending anything.")
@_profile_argument
@_set_option
@click.option(
    "--samples",
    "library_size",
    type=click.IntRange(min=1),
    help="Size of the sample library, instead of looking into its files.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def schedule(profile: str, overrides: tuple[str, ...], library_size: int | None, as_json: bool) -> None:
    """Show when PROFILE's queries are due: how many, for how long, the schedule's hash, and the rate over time."""
    from servebench.load.preview import count_samples, describe_schedule
    from servebench.load.scenario import plan_server
    from servebench.profile import load_profile
    from servebench.report.schedule import render_schedule

    loaded = load_profile(profile, overrides, files_needed=False)
    plan = plan_server(loaded.load, loaded.samples, library_size or count_samples(loaded.samples))
    document = describe_schedule(plan)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        render_schedule(loaded.name, document, console=_console())


@main.command(short_help="Check this host: the client's needs, devices, and every way to launch a server.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this host: what the client needs, its devices, and every way to launch a server; with a fix for each failure.

    Takes a second or two, starts no server and changes nothing. Exit code 0 when no check of the
    client failed and at least one way to launch works, else 1.
    """
    from servebench.doctor.examine import examine
    from servebench.doctor.render import render

    examination = examine()
    if as_json:
        click.echo(json.dumps(examination.document(), indent=2))
    else:
        render(examination, console=_console())
    ctx.exit(0 if examination.passed else _EXIT_FAILURE)


@main.command(name="profile-schema", short_help="Print the JSON Schema of load profiles, for editors.")
def profile_schema() -> None:
    """Print the JSON Schema of load profiles. Editors complete and check YAML files with it."""
    from servebench.profile import Profile

    click.echo(json.dumps(Profile.model_json_schema(), indent=2))


class _Launchers(click.Group):
    """One subcommand per installed launcher."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from servebench.launcher import launcher_names

        return launcher_names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from servebench.launcher import find_launcher, launcher_names

        if cmd_name not in launcher_names():
            return None
        launcher = find_launcher(cmd_name)
        options = "\n".join(_option_help(launcher.Options))
        return click.Command(
            cmd_name,
            callback=_serve_callback(cmd_name),
            short_help=f"Start {cmd_name} and keep it up.",
            help=f"Start {cmd_name} on 127.0.0.1, print its endpoints and how to test it, and keep it up until Ctrl-C; "
            "meanwhile say once a second how it fares.",
            epilog=f"\b\nOptions for --set, and for server.options in a profile:\n{options}",
            params=[
                _model_option(cmd_name),
                click.Option(["--set", "settings"], multiple=True, metavar="KEY=VALUE", help="One of the options below."),
                click.Option(["--dir", "work"], type=click.Path(path_type=Path), help="Where to keep its files and log."),
            ],
        )


def _model_option(launcher: str) -> click.Option:
    if launcher == "stub":
        return click.Option(["--model"], default="stub", show_default=True, help="What to call its model.")
    return click.Option(["--model"], callback=_require_model, help="Model to host.  [required]")


def _require_model(ctx: click.Context, _option: click.Parameter, model: str | None) -> str:
    """click can require an option itself, but not say what there is to give."""
    from servebench.profile import bundled_profiles, load_profile

    if model is not None:
        return model
    profiles = [load_profile(name, files_needed=False) for name in bundled_profiles()]
    names = sorted({one.endpoint.model for one in profiles if one.server.launch == ctx.info_name})
    raise ProfileError("--model: required" + (f"; bundled profiles have: {', '.join(names)}" if names else ""))


def _option_help(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A launcher's options with defaults and descriptions, those of nested sections below their own."""
    from typing import get_args

    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            value = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
            default = f"default {json.dumps(value, default=str)}"
        yield f"  {prefix}{name} ({default})\n      {field.description or ''}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _option_help(part, f"{prefix}{name}.")


@main.group(cls=_Launchers, short_help="Start a bundled server and keep it up.")
def serve() -> None:
    """Start one of the bundled servers on 127.0.0.1 and keep it up until Ctrl-C.

    \b
    Start here:
      servebench serve stub                        a server whose true behaviour is known
      servebench serve triton --model digits
      servebench serve torchserve --model digits --set workers=2
    """


def _serve_callback(name: str) -> Callable[..., None]:
    def callback(model: str, settings: tuple[str, ...], work: Path | None) -> None:
        import tempfile

        from pydantic import ValidationError

        from servebench.engine.hosting import interrupting, with_kept_log, with_log
        from servebench.engine.serving import END_SIGNALS
        from servebench.launcher import find_launcher
        from servebench.profile import apply_overrides, describe_validation_error

        launcher = find_launcher(name)
        given: dict[str, Any] = {}
        apply_overrides(given, settings)
        try:
            options = launcher.Options.model_validate(given)
        except ValidationError as error:
            raise ProfileError(f"--set {describe_validation_error(error, launcher.Options)}") from None
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        with interrupting(*END_SIGNALS), tempfile.TemporaryDirectory(prefix=f"servebench-{name}-") as scratch:
            try:
                _serve(name, launcher, model, options, work or Path(scratch))
            except LaunchError as error:
                if work is not None:
                    raise with_log(error, name, work) from None
                stem = re.sub(r"[^\w.-]+", "-", f"servebench-{name}-{model}-{_now()}")  # a model may be called a/b
                raise with_kept_log(error, name, Path(scratch), Path(stem)) from None

    return callback


def _serve(name: str, launcher: Launcher, model: str, options: BaseModel, work: Path) -> None:
    """Start a server with its files in ``work``, keep it up until a signal comes, stop it."""
    import signal

    from servebench.engine.hosting import launch_warnings
    from servebench.engine.serving import END_SIGNALS

    click.echo(f"servebench: starting {name}", err=True)
    try:
        server = launcher.launch(model, options, work)
    except ProfileError as error:  # an option that does not fit the model
        raise ProfileError(f"--set {error}") from None
    for warning in launch_warnings(server.describe()):
        click.echo(f"servebench: warning: {warning}", err=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # a signal before the watch hears them
            _keep_up(name, server, model)
    finally:
        for number in END_SIGNALS:  # what is stopped half way, its files included, leaves something behind
            signal.signal(number, signal.SIG_IGN)
        click.echo(f"servebench: stopping {name}", err=True)
        server.stop()


def _keep_up(name: str, server: RunningServer, model: str) -> None:
    """Say where a server is, and then how it fares, until a signal comes."""
    import asyncio

    from servebench.engine.run_lines import run_lines
    from servebench.engine.serving import watch
    from servebench.report.console import render_server
    from servebench.report.serving import ServingView

    width = max(len(kind) for kind in (*server.urls, "server"))
    for kind, url in server.urls.items():
        click.echo(f"{kind:{width}}  {url}")
    click.echo(f"{'log':{width}}  {server.log_path}")
    render_server(server.describe(), console=_console(), indent=width + 2)
    click.echo(f"{name} is ready and hosts {model!r}; Ctrl-C stops it.")
    lines = run_lines(name, server, model)
    click.echo("Test it:" if lines else "Test it with a profile whose samples fit it: servebench run --help")
    for line in lines:
        click.echo(f"  {line}")
    with ServingView(model) as view:
        asyncio.run(watch(server, model, view.show))


def _public(arguments: list[str]) -> list[str]:
    """The command line without header values, fit for a run directory."""
    return [f"{text.partition('=')[0]}=<redacted>" if "headers" in text and "=" in text else text for text in arguments]


def _now() -> str:
    """The local time, for names of files."""
    from datetime import datetime

    return datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")


def _default_directory(name: str) -> Path:
    stamp = _now()
    directory = Path("runs") / f"{name}-{stamp}"
    number = 2
    while directory.exists():
        directory = Path("runs") / f"{name}-{stamp}-{number}"
        number += 1
    return directory


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _report(directory: Path, *, as_json: bool) -> int:
    from servebench.engine.hosting import launch_warnings
    from servebench.judge.verdict import exit_code, judge
    from servebench.record.rundir import open_run
    from servebench.report.console import render
    from servebench.report.rewrite import write_reports

    stored = open_run(directory)
    document = judge(stored)
    unwritten: OSError | None = None
    try:
        write_reports(stored, document, directory)
    except OSError as error:
        unwritten = error
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        render(document, console=_console(), directory=directory)
    for warning in launch_warnings(document["server"] or {}):
        click.echo(f"servebench: warning: {warning}", err=True)
    for action in (document["server"] or {}).get("control", []):
        if "error" in action:
            click.echo(f"servebench: warning: the server was not left as it was found: {action['error']}", err=True)
    if unwritten is not None:
        click.echo(f"servebench: error: {directory}: its reports cannot be written: {unwritten.strerror}", err=True)
        return _EXIT_FAILURE
    return exit_code(document["verdict"])
