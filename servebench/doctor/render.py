"""The doctor's report for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from servebench.hostcheck import CheckGroup, HostCheck, State

from .examine import Examination

_MARKS = {State.OK: "[green]ok[/]", State.WARN: "[yellow]warn[/]", State.FAIL: "[red]FAIL[/]", State.ABSENT: "[dim]absent[/]"}


def render(examination: Examination, *, console: Console) -> None:
    """Print every group of checks, fixes below what needs them, and a line for each way to launch."""
    for group in examination.groups:
        console.print(f"[bold]{escape(group.title)}[/]")
        if console.is_terminal:
            console.print(_table(group))
        else:
            _print_lines(group, console)  # to be copied or searched: a check is a line
    console.print("[bold]Verdict[/]")
    client = "can measure" if examination.client_works else "[red]cannot measure: see Client above[/]"
    console.print(f"  client: {client}", soft_wrap=True)
    for group in examination.ways:
        console.print(f"  {_verdict(group)}", soft_wrap=True)
    console.print("  a server that already runs (server.url): needs nothing of this host", soft_wrap=True)


def _table(group: CheckGroup) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=6, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in group.checks:
        table.add_row(_MARKS[check.state], escape(check.name), _text(check, group))
    return table


def _print_lines(group: CheckGroup, console: Console) -> None:
    width = max(len(check.name) for check in group.checks)
    for check in group.checks:
        text = _text(check, group).replace("\n", "; ")
        console.print(f"{_MARKS[check.state]}  {escape(check.name):<{width}}  {text}", soft_wrap=True)


def _text(check: HostCheck, group: CheckGroup) -> str:
    # That a host lacks most kinds of devices needs no remedy; what a way to launch lacks does.
    with_fix = check.fix is not None and (group.way is not None or check.state is not State.ABSENT)
    text = f"{escape(check.found)} [dim]- {escape(check.meaning)}[/]"
    return f"{text}\n[bold]fix:[/] {escape(check.fix or '')}" if with_fix else text


def _verdict(group: CheckGroup) -> str:
    obstacle = group.obstacle
    way = escape(group.way or "")
    if obstacle is None:
        warned = any(check.state is State.WARN for check in group.checks)
        return f"{way}: [green]can launch[/]" + (" [yellow](see the warning)[/]" if warned else "")
    color = "dim" if obstacle.state is State.ABSENT else "red"
    return f"{way}: [{color}]cannot launch[/]: {escape(obstacle.name)}: {escape(obstacle.found)}"
