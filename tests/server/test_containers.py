"""The container files name what exists, and commands that `keye serve` understands."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from keye.commands.serve import serve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_copy_what_exists_and_run_what_parses(name: str) -> None:
    text = (ROOT / name).read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    assert json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1]) == ["keye", "serve"]  # type: ignore[index]
    command = json.loads(re.search(r"^CMD (\[.+\])$", text, re.MULTILINE)[1])  # type: ignore[index]
    context = serve.make_context("keye serve", command)
    assert context.params["host"] == "0.0.0.0" and context.params["model"] == "nano"
    assert text.index("USER 10001") < text.index("ENTRYPOINT"), "it does not run as root"


def test_the_space_runs_what_parses_with_a_key_alone() -> None:
    folder = ROOT / "examples" / "space"
    dockerfile, start = (folder / "Dockerfile").read_text(), (folder / "start.sh").read_text()
    front = dict(re.findall(r"^(\w+): (.+)$", (folder / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert front["sdk"] == "docker" and f"EXPOSE {front['app_port']}\n" in dockerfile
    assert dockerfile.rindex("USER 1000") < dockerfile.index("ENTRYPOINT"), "it does not run as root"
    line = re.search(r"^exec keye serve (.+)$", start, re.MULTILINE)[1]  # type: ignore[index]
    flags = [word for word in line.replace('"${KEYE_MODEL:-nano}"', "nano").split() if word != '"$@"']
    context = serve.make_context("keye serve", [*flags, "--allow-host", "me-keye.hf.space"])
    assert (context.params["host"], str(context.params["port"])) == ("0.0.0.0", front["app_port"])
    ended = subprocess.run(
        ["/bin/sh", str(folder / "start.sh")], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "KEYE_API_KEY is not set" in ended.stderr


def test_compose_runs_what_parses_and_mounts_what_exists() -> None:
    text = (ROOT / "compose.yaml").read_text()
    command = json.loads(re.search(r"build: \.\n    command: (\[.+\])", text)[1])  # type: ignore[index]
    assert serve.make_context("keye serve", command).params["port"] == 8000
    assert all((ROOT / path).exists() for path in re.findall(r"file: (\S+)", text))
    assert "KEYE_API_KEY:?" in text, "it does not start without a key"
    assert 'ports: ["127.0.0.1:8000:8000"]' in text


@pytest.mark.parametrize("name", ["keye", "decode", "vllm"])
def test_manifests_for_kubernetes_name_what_they_hold(name: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    objects = list(yaml.safe_load_all((ROOT / "examples" / "kubernetes" / f"{name}.yaml").read_text()))
    for item in objects:
        if item["kind"] == "Deployment":
            pod, labels = item["spec"]["template"], item["spec"]["selector"]["matchLabels"]
            assert labels.items() <= pod["metadata"]["labels"].items()
            (container,) = pod["spec"]["containers"]
            assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
            ports = [port["containerPort"] for port in container["ports"]]
            assert str(ports[0]) in container["args"] and container["readinessProbe"]["httpGet"]["port"] == ports[0]
            if name == "keye":
                assert serve.make_context("keye serve", list(container["args"])).params["host"] == "0.0.0.0"
                assert container["env"][0]["name"] == "KEYE_API_KEY", "it does not start without a key"
        elif item["kind"] == "Service":
            deployment = next(other for other in objects if other["kind"] == "Deployment")
            assert item["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
