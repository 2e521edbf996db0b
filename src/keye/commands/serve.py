"""`keye serve`: the model behind an OpenAI-compatible HTTP interface, and the page."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError, Option, missing_package
from keye.process import report_ready, watch_stdin

if TYPE_CHECKING:
    from keye.server.edge.audit import Audit
    from keye.server.settings import Settings

#: Largest file of keys.
_MAX_KEYS_BYTES = 1 << 20


@click.command(context_settings=options.CONTEXT)
@click.argument("model", default="nano")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key-file", type=options.PATH, metavar="FILE",
              help="Keys that clients must show, one a line: KEY or NAME:KEY.  [default: KEYE_API_KEY]")  # fmt: skip
@click.option("--allow-url", multiple=True, metavar="HOST", help="Fetch media from HOST, or *.HOST; may be repeated.")
@click.option("--allow-media-host", multiple=True, metavar="HOST", help="The same for one at a private address.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="Web page elsewhere that may use this server.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this server in the Host header.")
@click.option("--name", multiple=True, metavar="NAME",
              help="What clients call the model; may be repeated.  [default: its own name]")  # fmt: skip
@click.option("--strict-model-name", is_flag=True, help="Reject requests that name another model.")
@click.option("--strict-limits", is_flag=True, help="Reject a max_tokens that does not fit the context.")
@click.option("--max-upload", type=options.Bytes(), metavar="SIZE", help="Largest upload, as 500MB.  [default: 4GiB]")
@click.option("--max-stored", type=options.Bytes(), metavar="SIZE", help="Most bytes of all uploads.  [default: 16GiB]")
@click.option("--max-stored-per-key", type=options.Bytes(), metavar="SIZE",
              help="The same of one key.  [default: a quarter]")  # fmt: skip
@click.option("--max-queue", type=options.COUNT, metavar="N", help="Most requests at once.  [default: 256]")
@click.option("--max-seconds", type=options.Positive(), metavar="S", help="Longest request.  [default: 900]")
@click.option("--keep-files", type=options.Positive(), metavar="HOURS", help="How long uploads stay.  [default: 24]")
@click.option("--library", metavar="[DIR]", is_flag=False, flag_value="",
              help="Serve a library of videos, and index it: that in DIR, or that of keye library.")  # fmt: skip
@click.option("--library-manage", is_flag=True, help="Clients with a key may add and remove folders of it.")
@options.adapters
@click.option("--adapter-folder", type=options.PATH, metavar="DIR",
              help="Clients may load and unload the adapters in DIR, by /v1/load_lora_adapter.")  # fmt: skip
@options.transcribe
@click.option("--audit", type=options.PATH, metavar="FILE", help="Append a JSON line for each request.")
@click.option("--replicas", type=options.COUNT, metavar="N", help="Run N servers; requests about one video go to one.")
@click.option("--ray", metavar="ADDRESS", help="Run the replicas on a Ray cluster: ray, HOST:PORT or ray://HOST:PORT.")
@click.option("--engine", type=click.Choice(["keye", "vllm"]), default="keye", show_default=True,
              help="What computes: keye, or vLLM with keye's plug-in where it is installed.")  # fmt: skip
@click.option("--tp-size", type=options.COUNT, metavar="N", help="GPUs that vLLM divides the model over.  [default: 1]")
@click.option("--engine-option", multiple=True, metavar="OPTION",
              help="A further option of vLLM, as --engine-option=--max-model-len=32768; may be repeated.")  # fmt: skip
@click.option("--ready-fd", type=int, hidden=True,
              help="Report the address on this descriptor; end with standard input.")  # fmt: skip
@options.decode
@options.template
@options.running_device
@options.storing
@options.debug
@click.pass_context
def serve(
    context: click.Context, /, model: str, api_key_file: Path | None, audit: Path | None, replicas: int | None,
    ray: str | None, engine: str, tp_size: int | None, engine_option: tuple[str, ...], ready_fd: int | None,
    decode: str | None, **arguments: Any,
) -> None:  # fmt: skip
    """Serve a model over HTTP, for OpenAI clients and for the browser.

    Listens on this machine alone unless --host says otherwise, which needs a key. Media at addresses are fetched only
    from hosts that --allow-url names. SIGTERM ends the server when the running requests are done.

    \b
    keye serve
    keye serve 2.0 --port 9000 --name keye
    keye serve --host 0.0.0.0 --api-key-file keys.txt
    keye serve --replicas 2
    keye serve 2.0 --engine vllm --tp-size 2
    """
    from keye.commands.shared import inputs

    on_ready: Callable[[str], None] | None = None
    if ready_fd is not None:
        watch_stdin(lambda: os.kill(os.getpid(), signal.SIGTERM))
        on_ready = partial(_report_address, ready_fd)
    settings = settings_of(api_key_file, arguments)
    try:  # before minutes are spent on loading a model
        from keye.server.run import run_server
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "keye serve", "serve") from None

    if engine == "keye" and (tp_size is not None or engine_option):
        raise KeyeError("--tp-size and --engine-option are options of vLLM: give --engine vllm with them")
    if engine == "vllm":
        serve_vllm(context, settings, audit, on_ready)
        return
    if (folder := settings.adapter_folder) is not None and not folder.expanduser().is_dir():
        raise KeyeError(f"{folder} is not a folder: give --adapter-folder the one that adapters lie in")
    listening = listen(settings)
    if ray is not None and decode is not None:
        raise KeyeError("--decode cannot be used with --ray: the nodes of the replicas decode for themselves")
    if replicas is not None or ray is not None:
        if settings.adapter_folder is not None:
            raise KeyeError("--adapter-folder cannot be used with replicas, of which each would load its own: give "
                            "--adapter for each")  # fmt: skip
        with listening, audit_log(audit) as log:
            serve_replicas(context, replicas or 1, settings, listening, log)
        return
    with listening, inputs.open_decoder(decode) as decoder:
        loaded = inputs.load_model({**arguments, "model": model}, decoder=decoder)
        with audit_log(audit) as log:
            gauges = None if decoder is None else decoder.service.gauges
            run_server(loaded, settings, listening, log, gauges=gauges, on_ready=on_ready)


def _report_address(descriptor: int, address: str) -> None:
    """Reports to the process in front of this replica where it listens."""
    report_ready(descriptor, {"address": address})


def serve_replicas(
    context: click.Context, count: int, settings: Settings, listening: socket.socket, log: Audit | None
) -> None:
    """Serves by children that run this command with the same options, or by replicas on a cluster."""
    from keye.commands.shared import inputs
    from keye.server.replicas.processes import LocalReplica, Replica
    from keye.server.replicas.proxy import proxy_app
    from keye.server.run import run_app

    inputs.find_model(context.params["model"], context.params["mmproj"])
    replicas: Sequence[Replica]
    if (address := context.params["ray"]) is not None:
        from keye.server.replicas.ray_serve import ray_replicas

        replicas = ray_replicas(address, count, options.engine_settings(context.params), settings)
    else:
        own = inputs.shares(context.params, count)
        replicas = [LocalReplica(str(number), arguments_of(context, share)) for number, share in enumerate(own)]
    app = proxy_app(replicas)
    rows = {
        "replicas": f"{count}, each a server of its own",
        "model": ", ".join(settings.served_names) or context.params["model"],
    }
    run_app(app, settings, listening, rows, log, cut=app.state.proxy.cut)


#: Options that change nothing where vLLM computes.
_OF_KEYE = ("replicas", "ray", "decode", "mmproj", "template", "library", "library_manage", "transcribe",
            "transcribe_model", "device", "threads", "strict_limits", "adapter", "adapter_folder",
            *options.STORING_OPTIONS)  # fmt: skip


def serve_vllm(
    context: click.Context, settings: Settings, audit: Path | None, on_ready: Callable[[str], None] | None
) -> None:
    """Serves by vLLM as a child, behind the same guard."""
    from click.core import ParameterSource

    from keye.commands.shared import inputs
    from keye.server.replicas.processes import LocalReplica
    from keye.server.run import run_app
    from keye.server.settings import guard_settings
    from keye.server.vllm.app import DescribedModel, facts, vllm_app
    from keye.server.vllm.process import vllm_command

    parameters = context.params
    set_here = [n for n in _OF_KEYE if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if set_here:
        raise KeyeError("{} is an option of keye's own engine; leave it out with --engine vllm", Option(set_here[0]))
    ranks, own = parameters["tp_size"] or 1, list(parameters["engine_option"])
    if parameters["dtype"] is not None:
        own += ["--dtype", parameters["dtype"]]
    vllm_command(Path(), (), ranks, own)  # before a model is downloaded
    model = DescribedModel(Path(parameters["model"]).name, inputs.find_model(parameters["model"], weights=False))
    folder, names = inputs.find_model(parameters["model"]), settings.served_names or (model.name,)
    message = {"command": vllm_command(folder, names, ranks, own)}
    replica = LocalReplica("vllm", ("-m", "keye.server.vllm.process"), message)
    guard = guard_settings(settings)
    with listen(settings) as listening, audit_log(audit) as log:
        app = vllm_app(replica, model, settings, salt=guard.keys.salt)
        rows = facts(settings, names, ranks)
        run_app(app, settings, listening, rows, log, cut=app.state.proxy.cut, guard=guard, on_ready=on_ready)


def arguments_of(context: click.Context, own: Mapping[str, Any]) -> list[str]:
    """The command line of a replica: its own share, and the options of this command but those of the server in
    front."""
    arguments = {**context.params, **own}
    command = [context.params["model"]]
    for parameter in context.command.params:
        value = arguments.get(parameter.name or "")
        ours = parameter.name in ("model", "host", "port", "replicas", "ray", "audit", "ready_fd")
        if isinstance(parameter, click.Option) and not ours and value is not None:
            if parameter.is_flag and not parameter.secondary_opts:
                command += [parameter.opts[-1]] if value else []
                continue
            for share in value if parameter.multiple else [value]:
                command += [parameter.opts[-1], str(share)]
    return command


def settings_of(api_key_file: Path | None, arguments: Mapping[str, Any]) -> Settings:
    """The settings of the command line and of the environment."""
    from keye.config.environment import api_key, library_folder
    from keye.server.settings import Settings

    keys = read_keys(api_key_file) if api_key_file is not None else {}
    if api_key_file is None and (key := api_key()):
        keys = {"environment": key}
    names = {
        "max_upload": "upload_bytes", "max_stored": "stored_bytes", "max_stored_per_key": "key_bytes",
        "max_queue": "queue", "max_seconds": "request_seconds",
    }  # fmt: skip
    limits = {field: arguments[name] for name, field in names.items() if arguments[name] is not None}
    if arguments["transcribe"] is not None:
        from keye.commands.shared.inputs import open_transcriber

        limits["transcriber"] = open_transcriber(arguments)
    if arguments["library"] is not None:
        limits["library"] = Path(arguments["library"]).expanduser() if arguments["library"] else library_folder()
    if arguments["keep_files"] is not None:
        limits["file_seconds"] = arguments["keep_files"] * 3600
    return Settings(
        host=arguments["host"], port=arguments["port"], keys=keys, allow_urls=arguments["allow_url"],
        allowed_hosts=arguments["allow_host"], served_names=arguments["name"],
        strict_model_name=arguments["strict_model_name"], strict_limits=arguments["strict_limits"],
        allow_origins=arguments["allow_origin"], allow_media_hosts=arguments["allow_media_host"],
        library_manage=arguments["library_manage"], adapter_folder=arguments["adapter_folder"], **limits,
    )  # fmt: skip


def read_keys(file: Path) -> dict[str, str]:
    """The keys in a file by their names; a key without one is called after its line."""
    try:
        status = file.stat()
        if status.st_size > _MAX_KEYS_BYTES:
            raise KeyeError(f"{file} has more than {_MAX_KEYS_BYTES:,} bytes: give one key a line")
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KeyeError(f"{file} cannot be read ({error.strerror}): give a file with one key a line") from None
    except UnicodeDecodeError:
        raise KeyeError(f"{file} is not a text file: give a file with one key a line") from None
    if status.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        from keye.commands.shared.inputs import note

        note(f"{file} can be read by other users of this machine: chmod 600 {file}")
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, key = text.rpartition(":")
        name = name.strip() or f"line-{number}"
        if name in keys:
            raise KeyeError(f"{file} has the name {name!r} twice: give each key its own")
        keys[name] = key.strip()
    if not keys:
        raise KeyeError(f"{file} holds no key: write one a line, as KEY or NAME:KEY")
    return keys


@contextmanager
def audit_log(file: Path | None) -> Iterator[Audit | None]:
    """The audit log, appended to `file`; None without one."""
    from keye.server.edge.audit import Audit, is_audit_log

    if file is None:
        yield None
        return
    try:
        if file.is_file() and not is_audit_log(file):
            raise KeyeError(f"{file} is not an audit log of keye: choose another file for --audit")
        opened = file.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise KeyeError(f"{file} cannot be written ({error.strerror}): choose another file for --audit") from None
    with opened:
        yield Audit(opened.write)


def listen(settings: Settings) -> socket.socket:
    """A socket that is bound to the address, before the model is loaded: a port in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise KeyeError(f"{settings.host} is not an address to listen on ({error.strerror}): check --host") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise KeyeError(
            f"port {settings.port} of {settings.host} cannot be used ({error.strerror}): choose another with --port"
        ) from None
    return listening
