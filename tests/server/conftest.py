"""A server around a tiny random model, in this process and behind a real socket; for the page a mock server beside this
file, and a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from openai import OpenAI
from starlette.testclient import TestClient

import keye
from keye.data.frameforge import make_clip, write_mp4
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.support.mock_server import MockServer
from tests.support.serving import Ask, Running

CHROMIUM = shutil.which("chromium")
NANO = Path(__file__).parents[2] / "configs/nano"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> keye.Keye:
    """Two small layers with random weights: it answers at once, and nonsense."""
    from keye.config import model_config_from_dict
    from keye.models.load import save_model
    from keye.train.recipes.nano.initialise import fresh_model

    config = json.loads((NANO / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "num_experts": 2, "moe_intermediate_size": 32, "max_position_embeddings": 2048}
    config["sa_config"] |= {"indexer_num_heads": 2}
    config["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(NANO, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_model(fresh_model(model_config_from_dict(config), 0).bfloat16(), folder)
    return keye.load(folder)


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds, 112 x 112 pixels."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


@pytest.fixture(scope="session")
def http(model: keye.Keye) -> Iterator[TestClient]:
    """The application, called without a socket."""
    with TestClient(guarded_app(model, Settings()), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="session")
def file_id(http: TestClient, video: Path) -> str:
    """The video, uploaded."""
    return upload(http, video)["id"]


def upload(http: TestClient, path: Path) -> dict[str, Any]:
    answer = http.post("/v1/files", files={"file": (path.name, path.read_bytes())}, data={"purpose": "media"})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="session")
def running(model: keye.Keye) -> Iterator[Running]:
    server = Running(model, Settings())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(running: Running) -> OpenAI:
    """The official client, as it comes."""
    return OpenAI(base_url=f"{running.url}/v1", api_key="none needed here", max_retries=0)


@pytest.fixture(scope="session")
def ask(http: TestClient) -> Ask:
    """Posts a chat and returns the whole answer."""

    def post(content: Any = "hello", **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; the test is skipped where it or playwright is not installed. Of a module alone: while
    playwright is open, no other test in this process can run an event loop."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield opened
        opened.close()


@pytest.fixture
def server() -> Iterator[MockServer]:
    running = MockServer()
    yield running
    running.close()


@pytest.fixture
def page(browser: Any, server: MockServer) -> Iterator[Any]:
    """The page, freshly opened. After the test none of its scripts has failed, none was smuggled in, and no request has
    left the host."""
    context = browser.new_context(viewport={"width": 1280, "height": 850}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    failures: list[str] = []
    requested: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("console", lambda line: failures.append(line.text) if "Content Security Policy" in line.text else None)
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(server.address)
    opened.wait_for_selector("body[data-ready]")
    yield opened
    smuggled = opened.evaluate("window.hacked")
    context.close()
    assert failures == [] and smuggled is None
    assert [url for url in requested if not url.startswith((server.address, f"blob:{server.address}", "data:"))] == []
