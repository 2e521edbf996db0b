"""SGLang's generate, and the small routes that tools ask first."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

import keye
from tests.support.serving import error_of, read_events


def generate(http: TestClient, **fields: Any) -> Any:
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, **fields.pop("sampling_params", {})}
    answer = http.post("/generate", json={"sampling_params": params, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_text_goes_on_as_in_completions(http: TestClient) -> None:
    reply = generate(http, text="hello", rid="mine")
    other = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4, "temperature": 0,
                                               "ignore_eos": True}).json()  # fmt: skip
    assert reply["text"] == other["choices"][0]["text"] and len(reply["output_ids"]) == 4
    meta = reply["meta_info"]
    assert meta["id"] == "mine" and meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (other["usage"]["prompt_tokens"], 4)


def test_token_ids_are_the_same_prompt(http: TestClient) -> None:
    ids = http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    assert generate(http, input_ids=ids)["output_ids"] == generate(http, text="hello")["output_ids"]
    replies = generate(http, input_ids=[ids, ids])
    assert [reply["text"] for reply in replies] == [generate(http, text="hello")["text"]] * 2
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "hello", "text": "hello"}


def test_special_tokens_of_the_text_count(http: TestClient) -> None:
    chat = http.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True,
    }).json()  # fmt: skip
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    reply = generate(http, text=text)
    assert reply["meta_info"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    assert reply["text"].strip() == chat["choices"][0]["message"]["content"]


def test_a_stream_has_the_whole_text_in_each_event(http: TestClient) -> None:
    body = {"text": ["hello", "bye"], "stream": True,
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, "n": 2}}  # fmt: skip
    events = read_events(http.post("/generate", json=body))
    ends = [item for item in events if item["meta_info"]["finish_reason"]]
    assert [item["index"] for item in ends] == [0, 1, 2, 3]
    for end in ends:
        texts = [item["text"] for item in events if item["index"] == end["index"]]
        assert all(end["text"].startswith(text) for text in texts)
    assert ends[0]["text"] == generate(http, text="hello")["text"]


def test_probabilities(http: TestClient) -> None:
    reply = generate(http, text="hello", return_logprob=True, top_logprobs_num=2)
    meta = reply["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == reply["output_ids"]
    assert all(logprob <= 0 for logprob, _, _ in meta["output_token_logprobs"])
    assert [len(top) for top in meta["output_top_logprobs"]] == [2, 2, 2, 2]
    assert meta["input_token_logprobs"] == []
    ids = http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    scored = generate(http, text="hello", return_logprob=True, logprob_start_len=0)["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in scored] == ids and scored[0][0] is None
    assert all(logprob <= 0 for logprob, _, _ in scored[1:])
    rest = generate(http, text="hello", return_logprob=True, logprob_start_len=1)["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in rest] == ids[1:]


def test_a_form(http: TestClient) -> None:
    params = {"regex": "[ab]{3}", "max_new_tokens": 8, "ignore_eos": False}
    text = generate(http, text="x", sampling_params=params)["text"]
    assert len(text) == 3 and set(text) <= set("ab")
    schema = '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}'
    params = {"json_schema": schema, "max_new_tokens": 40, "ignore_eos": False}
    assert '"a"' in generate(http, text="x", sampling_params=params)["text"]


def test_media_stand_where_their_marks_are(http: TestClient, video: Path) -> None:
    data = base64.b64encode(video.read_bytes()).decode()
    alone = generate(http, text="what is it?", video_data=data)["meta_info"]["prompt_tokens"]
    marked = generate(http, text="<|vision_start|><|video_pad|><|vision_end|>what is it?", video_data=[data])
    assert marked["meta_info"]["prompt_tokens"] == alone > 30
    url = f"data:video/mp4;base64,{data}"
    assert generate(http, text="what is it?", video_data=url)["meta_info"]["prompt_tokens"] == alone


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "text"),
        ({"text": "x", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [9_999_999]}, "token"),
        ({"text": "x<|image_pad|>"}, "image"),
        ({"text": "x", "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"text": "x", "sampling_params": {"n": 99}}, "n must"),
        ({"text": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "x", "sampling_params": {"json_schema": "{"}}, "json_schema"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["x", "y"], "rid": ["a"]}, "rid"),
        ({"text": ["x", "y"], "return_logprob": [True]}, "return_logprob"),
        ({"text": ["x", "y"], "return_logprob": True, "logprob_start_len": [0]}, "logprob_start_len"),
        ({"input_ids": [5] * 2048}, "too long"),
        ({"input_ids": [[5], [5] * 200_000]}, "too long"),
        ({"text": "x", "image_data": "/etc/passwd"}, ""),
    ],
)
def test_mistakes(http: TestClient, body: dict[str, Any], sentence: str) -> None:
    assert sentence in error_of(http.post("/generate", json=body))["message"]


def test_tokens_that_stand_for_media_are_refused(http: TestClient, model: keye.Keye) -> None:
    error = error_of(http.post("/generate", json={"input_ids": [1, model.config.image_token_id]}))
    assert "media" in error["message"]


def test_small_routes(http: TestClient) -> None:
    assert http.get("/load").json() == {"server_load": 0}  # requests end a moment after their answer
    assert http.get("/ping").status_code == http.get("/health_generate").status_code == 200
    assert http.get("/version").json() == {"version": keye.__version__}
    for path in ("/get_model_info", "/model_info", "/get_server_info", "/server_info"):
        info = http.get(path).json()
        assert info["model_path"] == "tiny" and info["is_generation"] is True
    for tokens in ([9_999_999], [5] * 2049):
        assert error_of(http.post("/detokenize", json={"tokens": tokens}))["param"] == "tokens"


@pytest.mark.parametrize(
    "body", [{"prompt": "a" * 300_000}, {"messages": [{"role": "user", "content": "\U0001f600" * 70_000}]}]
)
def test_a_run_that_takes_much_memory_is_not_counted(http: TestClient, body: dict[str, Any]) -> None:
    answer = http.post("/tokenize", json=body)
    assert answer.status_code == 400 and "in a row" in answer.json()["error"]["message"], answer.text
    assert answer.json()["error"]["param"] == next(iter(body))


def test_what_is_ignored_is_noted_in_the_reply(http: TestClient) -> None:
    reply = generate(http, text="hello", no_logs=True, some_field=1, model="other",
                     sampling_params={"custom_params": {}, "odd": 2, "max_new_tokens": 100_000, "stop": ["1", "3"],
                                      "ignore_eos": False})  # fmt: skip
    notes = " | ".join(reply["keye"]["notes"])
    for part in (
        "no_logs, some_field",
        "odd",
        "sampling_params.custom_params",
        "'other' is not served",
        "max_tokens is 100,000",
    ):
        assert part in notes, notes
    answer = http.post("/detokenize", json={"tokens": [104], "some_field": 1})
    assert answer.json() == {"prompt": "h", "text": "h", "keye": {"notes": [
        "without effect here, and ignored: some_field"]}}  # fmt: skip
    answer = http.post("/tokenize", json={"prompt": "h", "return_token_strs": True})
    assert "return_token_strs" in answer.json()["keye"]["notes"][0]


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"sampling_parms": {}}, "sampling_params is probably meant"),
        ({"audio_data": "AAAA"}, "keye reads pictures and videos only"),
        ({"input_embeds": [[0.1]]}, "send text or input_ids"),
    ],
)
def test_fields_with_a_meaning_are_not_ignored(http: TestClient, field: dict[str, Any], sentence: str) -> None:
    answer = http.post("/generate", json={"text": "hello", **field})
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_the_sentences_of_addresses_and_bodies(http: TestClient) -> None:
    answer = http.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert http.get("/v1/models/").status_code == 404
    for body in ("[1]", '"x"', ""):
        kind = {"content-type": "application/json"}
        answer = http.post("/v1/chat/completions", content=body, headers=kind)
        assert answer.status_code == 400 and "must be a JSON object" in answer.json()["error"]["message"]


def test_a_picture_of_more_than_a_megabyte_is_read(http: TestClient) -> None:
    """What follows the end of a PNG counts for nothing."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "png")
    small = generate(http, text="hello", image_data=base64.b64encode(file.getvalue()).decode())
    large = base64.b64encode(file.getvalue() + bytes(1_000_000)).decode()
    for value in (large, [large], f"data:image/png;base64,{large}"):
        assert generate(http, text="hello", image_data=value)["text"] == small["text"]
