"""Build the container images, start each one and ask it the demo question over HTTP (`make image`).

    python tools/image.py [--engine docker|podman|buildah] [--tag NAME] [--if-possible] [FILE...]

The image must answer as an unprivileged user, reject a wrong key, and pass its own health check. Docker and Podman are
used where their service answers, else buildah, which needs no service: it runs the containers in a chroot on the host's
network. Where no registry can be reached, buildah builds on a Debian system made by debootstrap, once for each user. An
image for GPUs is asked on the CPU, so its start is checked but not its kernels.

Prints one line for each image. With `--if-possible`, a machine that cannot build images is not a failure; the
reason is printed. Storage of buildah lies in `~/.cache/keye-image`.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("Dockerfile", "Dockerfile.cuda")
VIDEO = ROOT / "src/keye/assets/demo.mp4"
QUESTION, ANSWER = "when is the cyan triangle visible?", "[[2.0, 14.0]]"
#: How long a container may take until it listens; kernels are compiled at the first start.
START_SECONDS = 180


class CannotBuildError(Exception):
    """This machine has no way to build container images; the text says why."""


def run(command: Sequence[str], quiet: bool = False, timeout: float | None = None) -> str:
    """Run a command of the engine and return its output. Without `quiet`, a failure shows what it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        if not quiet:
            print("\n".join((done.stdout + done.stderr).splitlines()[-60:]), file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout.strip()


def can_run(command: Sequence[str]) -> bool:
    try:
        run(command, quiet=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Docker:
    """Images and containers of docker or podman, whose commands are alike."""

    def __init__(self, command: str) -> None:
        self.command = command

    def build(self, file: str, tag: str) -> None:
        run([self.command, "build", "--file", file, "--tag", tag, "."])

    def config(self, tag: str) -> dict[str, Any]:
        return dict(json.loads(run([self.command, "image", "inspect", "--format", "{{json .Config}}", tag])))

    @contextmanager
    def start(self, tag: str, arguments: Sequence[str], key: str, port: int) -> Iterator[Docker]:
        options = ["--rm", "--detach", "--name", f"keye-{port}", "--publish", f"127.0.0.1:{port}:{port}"]
        options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--env", f"KEYE_API_KEY={key}"]
        run([self.command, "run", *options, tag, *arguments])
        self.container = f"keye-{port}"
        try:
            yield self
        except Exception:
            print(run([self.command, "logs", self.container]), file=sys.stderr)
            raise
        finally:
            run([self.command, "stop", self.container])

    def execute(self, command: Sequence[str]) -> str:
        return run([self.command, "exec", self.container, *command])


class Buildah:
    """Images of buildah, whose containers run in a chroot on the host's network."""

    def __init__(self) -> None:
        self.folder = Path.home() / ".cache/keye-image"
        self.folder.mkdir(parents=True, exist_ok=True)
        drivers = [driver for driver in ("overlay", "vfs") if self._works(driver)]
        if not drivers:
            raise CannotBuildError("buildah cannot make a container here")
        self.driver = drivers[0]
        self.base = self._find_base()

    def _command(self, *arguments: str, driver: str = "") -> list[str]:
        name = driver or self.driver
        state = Path(tempfile.gettempdir()) / f"keye-image-{os.getuid()}-{name}"
        storage = ["--root", f"{self.folder}/{name}", "--runroot", str(state), "--storage-driver", name]
        return ["buildah", *storage, *arguments]

    def _works(self, driver: str) -> bool:
        container = f"keye-probe-{os.getpid()}"
        try:
            run(self._command("from", "--name", container, "scratch", driver=driver), quiet=True, timeout=60)
            run(self._command("rm", container, driver=driver), quiet=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def _find_base(self) -> str:
        """The stand-in for `python:3.12-slim` where that cannot be pulled, else nothing."""
        if can_run(self._command("pull", "--quiet", "docker.io/library/python:3.12-slim")):
            return ""
        base = "localhost/keye-base"
        if can_run(self._command("inspect", "--type", "image", base)):
            return base
        if os.geteuid() or not shutil.which("debootstrap"):
            raise CannotBuildError("no registry of images can be reached, and debootstrap with root is missing")
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="debian-") as tree:
            self._make_base(Path(tree), base)
        return base

    def _make_base(self, tree: Path, name: str) -> None:
        packages = "python3,python3-pip,python3-venv,python-is-python3,ca-certificates,g++"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tree)]
        try:
            # In a mount namespace of its own: /proc and /sys that it mounts in the tree end with it, also when killed.
            run(["unshare", "--mount", "--propagation", "private", *command])
        except subprocess.CalledProcessError as error:
            raise CannotBuildError("no registry of images and no Debian mirror can be reached") from error
        for marker in tree.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()  # as in the official image, pip may install system-wide
        shutil.rmtree(tree / "var/cache/apt/archives")
        tree.chmod(0o755)
        container = run(self._command("from", "scratch"))
        run(self._command("add", "--quiet", container, str(tree), "/"))
        run(self._command("commit", "--quiet", "--rm", container, name))

    def build(self, file: str, tag: str) -> None:
        layers = f"--layers={str(self.driver == 'overlay').lower()}"  # with vfs each would be a copy of the whole tree
        options = ["--isolation", "chroot", layers, "--force-rm", "--format", "docker", "--file", file, "--tag", tag]
        if self.base:
            options += ["--from", self.base, "--pull=false", "--build-arg", "TORCH_INDEX=https://pypi.org/simple"]
            options += pip_options(self.folder)
        run(self._command("bud", *options, "."))
        can_run(self._command("rmi", "--prune"))  # layers of earlier builds that no container uses

    def config(self, tag: str) -> dict[str, Any]:
        return dict(json.loads(run(self._command("inspect", "--type", "image", tag)))["Docker"]["config"])

    @contextmanager
    def start(self, tag: str, arguments: Sequence[str], key: str, port: int) -> Iterator[Buildah]:
        self.container = "keye-check"
        can_run(self._command("rm", self.container))  # of a run that was killed
        run(self._command("from", "--pull-never", "--name", self.container, tag))
        environment = ["--env", f"KEYE_API_KEY={key}"]
        command = [*self.config(tag)["Entrypoint"], *arguments]
        log = self.folder / "server.log"
        with log.open("w") as output:
            server = subprocess.Popen(
                self._command("run", "--isolation", "chroot", *environment, self.container, "--", *command),
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            yield self
            check_owner(port)
        except Exception:
            print(log.read_text(), file=sys.stderr)
            raise
        finally:
            server.terminate()
            server.wait(timeout=60)
            run(self._command("rm", self.container))

    def execute(self, command: Sequence[str]) -> str:
        return run(self._command("run", "--isolation", "chroot", self.container, "--", *command))


def check_owner(port: int) -> None:
    """Assert that no process of the server runs as root; containers in a chroot share the host's process table."""
    owners = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if str(port).encode() in arguments and b"buildah" not in arguments[0] and b"serve" in arguments:
                owners.add(folder.stat().st_uid)
        except OSError:
            continue
    assert owners and 0 not in owners, f"the server's processes belong to the users {owners}"


def pip_options(folder: Path) -> list[str]:
    """Mounts with which pip in a build finds what pip on this machine finds; its settings go to a file in `folder`."""
    settings = {}
    for line in run([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    file = folder / "pip.conf"
    lines = [f"{name} = " + value.replace("\n", "\n    ") for name, value in settings.items()]
    file.write_text("\n".join(["[global]", *lines, ""]))
    words = " ".join(settings.values()).split()
    paths = [Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))]
    folders = {path.parent if path.name == "simple" else path for path in paths if path.exists()}
    return [f"--volume={file}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in sorted(folders))]


def find_engine(name: str) -> Docker | Buildah:
    for command in ("docker", "podman"):
        if name in ("", command) and can_run([command, "info"]):
            return Docker(command)
    if name in ("", "buildah") and shutil.which("buildah"):
        return Buildah()
    raise CannotBuildError(f"{name} does not work here" if name else "none of docker, podman and buildah works here")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str, key: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as response:
        return json.load(response)


def wait_until_healthy(url: str, key: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            get(f"{url}/health", key)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not answer after {START_SECONDS} s: {error}") from error
            time.sleep(0.5)


def ask(url: str, key: str) -> str:
    """The answer to the demo question, with the demo video in the request."""
    video = "data:video/mp4;base64," + base64.b64encode(VIDEO.read_bytes()).decode()
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": QUESTION}]
    body = {"model": "nano", "messages": [{"role": "user", "content": content}], "temperature": 0}
    return str(get(f"{url}/v1/chat/completions", key, body)["choices"][0]["message"]["content"])


def status_with(url: str, key: str) -> int:
    """The HTTP status of a request with this key."""
    try:
        get(f"{url}/v1/models", key)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def check_image(engine: Docker | Buildah, file: str, tag: str) -> str:
    """Build and try one image; return a line that says how long both took."""
    began = time.monotonic()
    try:
        engine.build(file, tag)
    except subprocess.CalledProcessError:
        engine.build(file, tag)  # it downloads hundreds of packages, and one of them may fail
    built = time.monotonic()
    config = engine.config(tag)
    port, key = free_port(), secrets.token_hex(16)
    arguments = [str(port) if word == "8000" else word for word in config["Cmd"]]
    if "cuda" in arguments:
        arguments[arguments.index("cuda")] = "cpu"
    url = f"http://127.0.0.1:{port}"
    with engine.start(tag, arguments, key, port) as container:
        wait_until_healthy(url, key)
        answer = ask(url, key)
        assert answer == ANSWER, f"{file}: the answer is {answer!r}, not {ANSWER!r}"
        status = status_with(url, "wrong")
        assert status == 401, f"{file}: a wrong key gets {status}"
        user = container.execute(["id", "-u"])
        assert user not in ("", "0"), f"{file}: commands run as user {user!r}"
        health = config["Healthcheck"]["Test"]
        assert health[0] == "CMD", f"{file}: the health check needs a shell"
        container.execute([word.replace(":8000", f":{port}") for word in health[1:]])
    return f"{file}: built in {built - began:.0f} s, answered as user {user} in {time.monotonic() - built:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE")
    parser.add_argument("--engine", default="", choices=["", "docker", "podman", "buildah"])
    parser.add_argument("--tag", default="", help="name of the image, by default localhost/keye with the file's name")
    parser.add_argument("--if-possible", action="store_true")
    options = parser.parse_args()
    try:
        engine = find_engine(options.engine)
    except CannotBuildError as error:
        print(f"container images were not built: {error}")
        return 0 if options.if_possible else 1
    passed = 0
    for file in options.files:
        try:
            tag = options.tag or "localhost/keye:" + file.lower().replace(".", "-")
            print(check_image(engine, file, tag), flush=True)
            passed += 1
        except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"{file}: {error}", file=sys.stderr)
    print(f"image: {passed} passed, {len(options.files) - passed} failed")
    return 0 if passed == len(options.files) else 1


if __name__ == "__main__":
    sys.exit(main())
