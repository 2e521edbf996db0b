"""`keye eval list` and `keye eval prepare`: the tasks, and whether their data are here and complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from keye.commands.shared import options
from keye.commands.shared.show import stdout as show_console
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.evals.task import Task

#: Columns of a terminal in which source and licence have room.
_WIDE: Final = 120


@click.command("list", context_settings=options.CONTEXT)
@click.argument("names", nargs=-1, metavar="[TASK]...")
@click.option("--data", type=options.PATH, metavar="DIR",
              help="Where data are looked for.  [default: KEYE_EVAL_DATA, ~/.local/share/keye/evals]")  # fmt: skip
@options.as_json
@options.debug
def list_tasks(names: tuple[str, ...], data: Path | None, as_json: bool) -> None:
    """List the tasks, what each measures, and whether its data are here. Of the tasks that are named, all there is to
    know: where the data come from, their licence and gate, the scorers.

    \b
    keye eval list --data ~/data
    keye eval list mlvu_dev timelens
    """
    from keye.commands.shared import show
    from keye.config.environment import eval_folder
    from keye.evals.task import find_tasks
    from keye.evals.task import list_tasks as known_tasks

    tasks = [task for name in names for task in find_tasks(name)] if names else known_tasks()
    rows = [_describe(task, data or eval_folder()) for task in tasks]
    if as_json:
        show.print_json({"tasks": rows})
    elif names:
        for row in rows:
            _print_task(row)
    else:
        _print_table(rows)


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each task, cut to the width; a wide terminal also has source and licence."""
    console = show_console()
    lines = [("task", "data", "measures", "source", "licence")]
    for row in rows:
        state = "cannot run yet" if row["available"] else row["data"]
        lines.append((row["name"], state, row["measures"], row["source"], row["licence"]))
    name, data = (max(len(cells[column]) for cells in lines) for column in (0, 1))
    left = max(20, console.width - name - data - 4)
    measures = left * 2 // 5 if console.width >= _WIDE else left
    widths = (name, data, measures, *((left - measures) // 2 - 2,) * (2 if measures < left else 0))
    for cells in lines:
        line = "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=False))
        console.print(line.rstrip(), soft_wrap=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _print_task(row: Mapping[str, Any]) -> None:
    lines = {
        "measures": row["measures"], "media": row["media"], "dimension": row["dimension"], "source": row["source"],
        "licence": row["licence"], "gate": row["gate"], "scorers": ", ".join(row["scorers"]),
        "data": row["data"], "problem": row["problem"], "cannot run yet": row["available"],
    }  # fmt: skip
    console = show_console()
    console.print(f"{row['name']}: {row['title']}", soft_wrap=True)
    for name, value in lines.items():
        if value:
            console.print(f"  {name}: {value}", soft_wrap=True)


def _describe(task: Task, root: Path) -> dict[str, Any]:
    data, problem = _state(task, root)
    return {
        "name": task.name, "title": task.title, "measures": task.measures, "media": task.media, "source": task.source,
        "licence": task.licence, "gate": task.gate, "dimension": task.dimension, "scorers": list(task.scorers),
        "available": task.available, "data": data, "problem": problem,
    }  # fmt: skip


def _state(task: Task, root: Path) -> tuple[str, str | None]:
    """Whether the data are here: "complete", "incomplete", "not here" or "needs none"; and the first thing that is
    wrong."""
    from keye.evals.settings import data_folder

    if "/" not in task.source:
        return "needs none", None
    folder = data_folder(task, root)
    if not folder.is_dir():
        return "not here", None
    try:
        report = task.check(folder)
    except KeyeError:
        if folder == root:  # which holds the data of other tasks
            return "not here", None
        raise
    if folder == root and not report.counts.get("rows"):
        return "not here", None
    if report.is_complete:
        return "complete", None
    return "incomplete", (*report.problems, f"{len(report.missing_media):,} media are missing")[0]


@click.command(context_settings=options.CONTEXT)
@click.argument("name", metavar="TASK")
@click.option("--from", "source", type=options.PATH, metavar="DIR", help="Folder with the public files of the task.")
@click.option("--decode", "probes", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="How many media are opened to see whether they decode; 0 opens none.")  # fmt: skip
@click.option("--download", is_flag=True, help="Fetch the files from the hub into the folder first.")
@click.option("--unpack", is_flag=True, help="Unpack the archives in the folder, each where it lies.")
@options.as_json
@options.debug
def prepare(name: str, source: Path | None, probes: int, download: bool, unpack: bool, as_json: bool) -> int:
    """Check the data of TASK: fields, counts, media that are there and decode. Nothing is fetched without --download.

    \b
    keye eval prepare timelens_charades --from ~/data/TimeLens-Bench
    keye eval prepare mlvu_dev --from ~/data/MLVU --download --unpack
    """
    from keye.commands.shared import inputs, show
    from keye.config.environment import eval_folder
    from keye.evals.data.prepare import unpack_archives
    from keye.evals.task import find_task
    from keye.units import format_bytes

    task = find_task(name)
    folder = source or eval_folder() / task.name
    if download:
        _download(task, folder)
    if unpack:
        done = unpack_archives(folder)
        inputs.note(f"{done.unpacked:,} files ({format_bytes(done.bytes)}) were unpacked, {done.present:,} were there, "
                    f"{done.left:,} were left")  # fmt: skip
    report = task.check(folder)
    broken = _broken_media(task, folder, probes) if report.is_complete and probes and task.media != "text" else {}
    data = {**report.to_dict(), "broken_media": broken}
    if as_json:
        show.print_json(data)
    else:
        _print_report(task, data)
    is_ready = report.is_complete and not broken
    if not is_ready:
        inputs.note(f"{task.name} is not ready in {folder}; its source is {task.source or 'your own'}"
                    + (f" ({task.gate})" if task.gate else ""))  # fmt: skip
    return 0 if is_ready else 2


def _print_report(task: Task, data: Mapping[str, Any]) -> None:
    from keye.commands.shared import show

    counts = ", ".join(
        f"{count:,} {name}" + (f" of {data['expected'][name]:,}" if name in data["expected"] else "")
        for name, count in data["counts"].items()
    )
    show.print_line(f"{task.name} in {data['folder']}: {counts or 'nothing counted'}")
    if data["missing_fields"]:
        show.print_line(f"fields that rows lack: {', '.join(data['missing_fields'])}")
    for sentence in (*data["problems"], *data["notes"]):
        show.print_line(sentence)
    for name in data["missing_media"][:20]:
        show.print_line(f"missing: {name}")
    if len(data["missing_media"]) > 20:
        show.print_line(f"and {len(data['missing_media']) - 20:,} more")
    for name, reason in data["broken_media"].items():
        show.print_line(f"does not decode: {name} ({reason})")
    if data["complete"] and not data["broken_media"]:
        show.print_line("complete")


def _broken_media(task: Task, folder: Path, probes: int) -> dict[str, str]:
    """Those of a sample of media, evenly over the data, that cannot be opened by the decode workers, and why."""
    from keye.evals.data.probe import probe_media
    from keye.evals.task import TaskSettings

    names = list(dict.fromkeys(
        str(part[part["type"]]) for item in task.read(folder, TaskSettings()) for part in item.content
        if part["type"] in ("video", "image")
    ))  # fmt: skip
    step = max(1, len(names) // probes)
    return probe_media(names[::step][:probes])


def _download(task: Task, folder: Path) -> None:
    """Fetches the files of the task's repository. `KeyeError` for one that has no repository or is gated."""
    if "/" not in task.source:
        raise KeyeError(
            f"{task.name} has no source on the hub ({task.source or 'your own files'}): leave out --download"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(task.source, repo_type="dataset", local_dir=folder)
    except (HfHubHTTPError, OSError) as error:
        gate = f"; {task.gate}" if task.gate else ""
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise KeyeError(f"{task.source} cannot be fetched ({reason}){gate}: fetch it by hand into {folder}") from None
