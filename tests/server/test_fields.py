"""Fields of requests that programs send in the dialects of other servers: what is honoured, noted, and an error."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

import keye
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.support.serving import error_of, read_events

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(http: TestClient, **fields: Any) -> dict[str, Any]:
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(http: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    answer = http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def notes_of(answer: dict[str, Any]) -> str:
    return "; ".join(answer.get("keye", {}).get("notes", []))


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def strict(model: keye.Keye) -> Iterator[TestClient]:
    settings = Settings(served_names=("one", "two"), strict_model_name=True, strict_limits=True)
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1") as client:
        yield client


# Unknown and harmless fields


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_field": "0"}, {"user": "me"}, {"metadata": {"a": "b"}}, {"client_metadata": {}}, {"include": ["x"]},
        {"request_id": "abc"}, {"rid": "x"}, {"priority": 0}, {"cache_salt": "x"}, {"service_tier": "auto"},
        {"store": True}, {"prediction": {"type": "content"}}, {"stream_options": {"nonsense": 1}},
        {"chat_template_kwargs": {"nonsense": 1}}, {"messages": [{"role": "user", "content": "x", "extra": 0}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache": {}}]}]},
        {"structured_outputs": {"choice": ["a"], "backend": "x"}},
    ],
)  # fmt: skip
def test_what_means_nothing_here_is_ignored_with_a_note(http: TestClient, fields: dict[str, Any]) -> None:
    assert "ignored" in notes_of(chat(http, **fields))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x", "name": "me", "tool_calls": [], "tool_call_id": "c"}],
        [{"role": "critic", "content": "x", "name": "me"}],
        [*HELLO, {"role": "assistant", "content": None, "reasoning_content": "hm"}, *HELLO],
        [*HELLO, {"role": "assistant", "content": None, "tool_calls": []}, *HELLO],
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, *HELLO],
        [{"role": "user", "content": [{"text": "x"}, {"type": "input_text", "text": "y", "cache_control": {}}]}],
    ],
)
def test_messages_as_programs_send_them_back(http: TestClient, messages: list[dict[str, Any]]) -> None:
    assert chat(http, messages=messages)["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "meant"),
    [
        ({"temprature": 0.5}, "temprature", "temperature"),
        ({"Temperature": 0.5}, "Temperature", "temperature"),
        ({"topP": 0.5}, "topP", "top_p"),
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"stream_option": {}}, "stream_option", "stream_options"),
        ({"messages": [{"role": "user", "contnet": "x", "content": "x"}]}, "messages[0].contnet", "content"),
        ({"chat_template_kwargs": {"enable_thinkng": True}}, "chat_template_kwargs.enable_thinkng", "enable_thinking"),
        ({"preprocess_kwargs": {"max_frame": 3}}, "preprocess_kwargs.max_frame", "max_frames"),
    ],
)
def test_typing_errors_are_errors(http: TestClient, fields: dict[str, Any], param: str, meant: str) -> None:
    error = error_of(http.post(CHAT, json={"messages": HELLO, **fields}))
    assert error["param"] == param and meant in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["audio"]}, "modalities"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids[0]"),
        ({"stop": ["a"] * 20}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"stop_token_ids": list(range(5000))}, "stop_token_ids"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"json_schema": "{"}, "json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"mm_processor_kwargs": {"size": 3}}, "mm_processor_kwargs.size"),
    ],
)
def test_what_cannot_be_met_is_an_error(http: TestClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(http.post(CHAT, json={"messages": HELLO, "max_tokens": 8, **fields}))
    assert error["param"] == param


def test_other_names_of_a_field(http: TestClient) -> None:
    answer = chat(http, max_tokens=None, max_new_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3 and "max_new_tokens is called max_tokens" in notes_of(answer)


def test_many_unknown_names_are_refused_before_they_are_compared(http: TestClient) -> None:
    few = {f"far_from_any_{i}": 1 for i in range(60)}
    assert "and 44 more" in notes_of(chat(http, **few))
    many = {f"far_from_any_{i}": 1 for i in range(5000)}
    assert "more than 64 names" in error_of(http.post(CHAT, json={"messages": HELLO, **many}))["message"]
    talk = [{"role": "user", "content": "x", "created_at": 1}] * 100
    assert notes_of(chat(http, messages=talk)).count("created_at") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True}, {"thinking": True}, {"thinking": {"type": "enabled"}}, {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": True}, "thinking": False},
    ],
)  # fmt: skip
def test_names_of_the_switch_of_reasoning(http: TestClient, fields: dict[str, Any]) -> None:
    opened, plain = (chat(http, **arguments)["usage"]["prompt_tokens"] for arguments in (fields, {}))
    assert opened > plain


def test_a_field_given_under_two_names_counts_once(http: TestClient) -> None:
    body = {"input": "x", "max_output_tokens": 4, "max_tokens": 3, "include": ["x"], "text": {"verbosity": "low"}}
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["output_tokens"] <= 4
    for name in ("max_tokens", "include x", "text.verbosity"):
        assert name in notes_of(answer.json())


def test_notes_of_a_stream_come_with_its_end(http: TestClient) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True, "user": "me"}
    *_, last = read_events(http.post(CHAT, json=body))
    assert last["choices"][0]["finish_reason"] and "user" in notes_of(last)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_stream_tells_that_its_reply_repeated_itself(http: TestClient, route: str) -> None:
    prompt = {"messages": HELLO} if route == CHAT else {"prompt": "hello"}
    body = {**prompt, "max_tokens": 150, "logit_bias": {"50": 100}, "stream": True}
    *_, last = read_events(http.post(route, json=body))
    assert last["choices"][0]["finish_reason"] == "length" and "repeated itself and was stopped" in notes_of(last)


# Names and limits


@pytest.mark.parametrize("name", ["", "gpt-5", None])
def test_any_model_is_the_one_that_is_served(http: TestClient, name: str | None) -> None:
    for path, fields in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        answer = http.post(path, json={"model": name, "max_tokens": 1, **fields}).json()
        assert answer["model"] == "tiny" and ("'gpt-5' is not served" in notes_of(answer)) == bool(name)


def test_strict_names(strict: TestClient) -> None:
    assert [model["id"] for model in strict.get("/v1/models").json()["data"]] == ["one", "two"]
    assert strict.get("/v1/models/two").json()["id"] == "two"
    assert chat(strict, model="two")["model"] == chat(strict, model="")["model"] == "one"
    error = error_of(strict.post(CHAT, json={"model": "three", "messages": HELLO}), 404)
    assert error["code"] == "model_not_found"


def test_a_reply_is_as_long_as_the_context_has_room(http: TestClient, strict: TestClient) -> None:
    answer = complete(http, prompt=[300] * 2040, max_tokens=100_000)
    assert answer["usage"]["completion_tokens"] == 8
    assert "leaves 8 for the reply" in notes_of(answer)
    body = {"messages": HELLO, "max_tokens": 100_000, "stream": True}
    assert "context holds 2048" in error_of(strict.post(CHAT, json=body))["message"]


def test_the_model_cards_own_request(http: TestClient, file_id: str) -> None:
    part = {"type": "video_url", "video_url": {"url": file_id}, "preprocess_kwargs": {"fps": 1, "max_frames": 4}}
    answer = chat(
        http, model="", messages=[{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], n=1, top_k=1,
        ignore_eos=False, skip_special_tokens=False, max_tokens=32_768, seed=0, stream=False, stop=["0", "1", "2"],
    )  # fmt: skip
    assert answer["usage"]["media"][0]["frames"] == 4


# Sampling


def test_bias_penalties_and_allowed_tokens(http: TestClient) -> None:
    free = complete(http, return_token_ids=True)["choices"][0]["token_ids"]
    other = next(token for token in range(300, 320) if token not in free)
    forced = complete(http, return_token_ids=True, logit_bias={str(other): 100})["choices"][0]
    assert forced["token_ids"] == [other] * 4
    allowed = complete(http, return_token_ids=True, allowed_token_ids=[other, other + 1])["choices"][0]["token_ids"]
    assert set(allowed) <= {other, other + 1}
    without = complete(http, return_token_ids=True, logit_bias={str(free[0]): -100})["choices"][0]["token_ids"]
    assert free[0] not in without
    varied = complete(http, return_token_ids=True, frequency_penalty=2, presence_penalty=2, max_tokens=12)
    plain = complete(http, return_token_ids=True, max_tokens=12)
    assert len(set(varied["choices"][0]["token_ids"])) > len(set(plain["choices"][0]["token_ids"]))


def test_stop_tokens_and_strings(http: TestClient) -> None:
    tokens = complete(http, return_token_ids=True, max_tokens=8)["choices"][0]["token_ids"]
    stop = tokens[2]
    place = tokens.index(stop)
    choice = complete(http, return_token_ids=True, max_tokens=8, stop_token_ids=[stop])["choices"][0]
    assert choice["token_ids"] == tokens[:place]
    assert (choice["finish_reason"], choice["stop_reason"], choice["matched_stop"]) == ("stop", stop, stop)
    text = complete(http, max_tokens=8)["choices"][0]["text"]
    for stored in (False, True):
        choice = complete(http, max_tokens=8, stop=[text[3]], include_stop_str_in_output=stored)["choices"][0]
        assert choice["text"] == text[: text.index(text[3]) + stored]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text[3])


def test_nothing_ends_a_reply_before_min_tokens(http: TestClient) -> None:
    tokens = complete(http, return_token_ids=True, max_tokens=8)["choices"][0]["token_ids"]
    answer = complete(http, return_token_ids=True, max_tokens=8, min_tokens=6, stop_token_ids=[tokens[0]])
    assert answer["usage"]["completion_tokens"] >= 6 and tokens[0] not in answer["choices"][0]["token_ids"][:6]


def test_bad_words_do_not_come(http: TestClient) -> None:
    text = complete(http, max_tokens=8)["choices"][0]["text"]
    assert text[0] not in complete(http, max_tokens=8, bad_words=[text[0]])["choices"][0]["text"]


def test_reasoning_ends_at_its_budget(http: TestClient) -> None:
    answer = chat(
        http, chat_template_kwargs={"enable_thinking": True}, thinking_token_budget=3, max_tokens=8,
        structured_outputs={"choice": ["yes"]}, ignore_eos=False,
    )  # fmt: skip
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 4
    assert text_of(answer) == "yes" and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("fields", "where"), [({"separate_reasoning": False}, "content"), ({}, "reasoning_content"),
                                               ({"include_reasoning": False}, None)])  # fmt: skip
def test_where_reasoning_stands(http: TestClient, model: keye.Keye, fields: dict[str, Any], where: str | None) -> None:
    (token,) = model.tokenizer.encode("a")
    requested = {
        "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 3, "max_tokens": 8,
        "logit_bias": {str(token): 100}, "temperature": 0, "ignore_eos": True, **fields,
    }  # fmt: skip
    message = chat(http, **requested)["choices"][0]["message"]
    assert ("reasoning_content" in message) == (where == "reasoning_content")
    assert message["content"].startswith("<think>\n") == (where == "content")
    chunks = read_events(http.post(CHAT, json={"messages": HELLO, "stream": True, **requested}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert any("reasoning_content" in delta for delta in deltas) == (where == "reasoning_content")


# Prompts


def test_prompts_of_token_ids(http: TestClient) -> None:
    ids = http.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()["tokens"]
    full = complete(http)["choices"][0]["text"]
    assert complete(http, prompt=ids)["choices"][0]["text"] == full
    two = complete(http, prompt=[ids, ids], echo=True)["choices"]
    assert [choice["text"] for choice in two] == [f"hello{full}"] * 2
    for wrong in ([10**6], [], [[]], [True], [-1], [1.5], [[1], "a"], 5):
        assert error_of(http.post(COMPLETIONS, json={"prompt": wrong}))["param"].startswith("prompt")


def test_a_prompt_of_media_tokens_is_rejected(http: TestClient, model: keye.Keye) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": [1, model.config.image_token_id]}))
    assert "stand for media" in error["message"]


def test_a_prompt_that_is_cut_at_its_beginning(http: TestClient) -> None:
    ids = http.post("/tokenize", json={"prompt": "one two three"}).json()["tokens"]
    cut = complete(http, prompt="one two three", truncate_prompt_tokens=2, return_token_ids=True)["choices"][0]
    assert cut["prompt_token_ids"] == ids[-2:]
    fitting = complete(http, prompt="a b " * 2000, truncate_prompt_tokens=-1)["usage"]
    assert (fitting["prompt_tokens"], fitting["completion_tokens"]) == (2044, 4)
    body = {"prompt": "a", "truncate_prompt_tokens": 0}
    assert error_of(http.post(COMPLETIONS, json=body))["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored(http: TestClient, stream: bool) -> None:
    fields = {"prompt": ["one two", "x"], "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0, "n": 2}
    full = complete(http, **fields)["choices"]
    if stream:
        grown: dict[int, list[dict[str, Any]]] = {}
        for chunk in read_events(http.post(COMPLETIONS, json={**fields, "ignore_eos": True, "stream": True})):
            grown.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
        for index, pieces in grown.items():
            assert "".join(piece["text"] for piece in pieces) == full[index]["text"]
            told_lists = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
            for name, listed in full[index]["logprobs"].items():
                assert [item for lists in told_lists for item in lists[name]] == listed
        return
    for choice in full:
        probs = choice["logprobs"]
        assert "".join(probs["tokens"]) == choice["text"]
        assert probs["token_logprobs"][0] is None and probs["top_logprobs"][0] is None
        assert all(value <= 0 for value in probs["token_logprobs"][1:])
        for at, token in zip(probs["text_offset"], probs["tokens"], strict=True):
            assert choice["text"][at:].startswith(token)
        for token, top in zip(probs["tokens"][1:], probs["top_logprobs"][1:], strict=True):
            assert token in top and len(top) in (2, 3)


def test_scoring_alone_writes_nothing(http: TestClient) -> None:
    scored = complete(http, prompt="one two", echo=True, logprobs=0, max_tokens=0)
    assert scored["choices"][0]["text"] == "one two" and scored["usage"]["completion_tokens"] == 0
    longer = complete(http, prompt="one two", echo=True, logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    count = len(scored["choices"][0]["logprobs"]["tokens"])
    assert longer["token_logprobs"][:count] == scored["choices"][0]["logprobs"]["token_logprobs"]
    error_of(http.post(COMPLETIONS, json={"prompt": "one", "max_tokens": 0}))


def test_prompt_logprobs_of_a_chat(http: TestClient) -> None:
    answer = chat(http, prompt_logprobs=1, return_token_ids=True)
    ids, probs = answer["prompt_token_ids"], answer["prompt_logprobs"]
    assert len(ids) == len(probs) == answer["usage"]["prompt_tokens"] and probs[0] is None
    for token, entry in zip(ids[1:], probs[1:], strict=True):
        assert entry[str(token)]["rank"] >= 1 and entry[str(token)]["logprob"] <= 0
        assert min(item["rank"] for item in entry.values()) == 1
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_the_best_of_several(http: TestClient) -> None:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 4}
    every = complete(http, n=4, logprobs=0, **fields)["choices"]
    likelihood = [sum(item["logprobs"]["token_logprobs"]) / 4 for item in every]
    best = complete(http, n=1, best_of=4, **fields)
    assert best["choices"][0]["text"] == every[likelihood.index(max(likelihood))]["text"]
    assert best["usage"]["completion_tokens"] == 16
    error_of(http.post(COMPLETIONS, json={"prompt": "a", "n": 3, "best_of": 2}))
    error_of(http.post(COMPLETIONS, json={"prompt": "a", "n": 1, "best_of": 2, "stream": True}))


# Beginnings of replies


def test_a_reply_goes_on_with_the_last_message(http: TestClient) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The red"}]
    plain = chat(http, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert chat(http, messages=[*HELLO, {**messages[1], "prefix": True}])["choices"] == plain["choices"]
    echoed = chat(http, messages=messages, continue_final_message=True, echo=True)
    assert text_of(echoed) == "The red" + text_of(plain)
    closed = chat(http, messages=messages)
    assert closed["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    bare = chat(http, add_generation_prompt=False)
    assert bare["usage"]["prompt_tokens"] < chat(http)["usage"]["prompt_tokens"]


def test_usage_in_every_chunk(http: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, fields in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        body = {"max_tokens": 3, "ignore_eos": True, "stream": True, "stream_options": options, **fields}
        usage = [chunk["usage"] for chunk in read_events(http.post(path, json=body))]
        assert all(item["total_tokens"] == item["prompt_tokens"] + item["completion_tokens"] for item in usage)
        counts = [item["completion_tokens"] for item in usage]
        assert counts == sorted(counts) and counts[-1] == 3


# Media


@pytest.mark.parametrize(
    "fields",
    [
        {"media_io_kwargs": {"video": {"num_frames": 2}}},
        {"mm_processor_kwargs": {"num_frames": 2, "do_rescale": True}},
        {"mm_processor_kwargs": {"videos_kwargs": {"num_frames": 2}}},
        {"preprocess_kwargs": {"nframes": 2}},
    ],
)
def test_settings_of_media_under_other_names(http: TestClient, file_id: str, fields: dict[str, Any]) -> None:
    part = {"video_url": {"url": file_id}, "uuid": "abc"}
    answer = chat(http, messages=[{"role": "user", "content": [part, {"text": "?"}]}], **fields)
    assert answer["usage"]["media"][0]["frames"] == 2 and "uuid" in notes_of(answer)


def test_settings_with_a_value_for_each_medium(http: TestClient, file_id: str) -> None:
    """As keye-vl-utils gives them to a client of vLLM."""
    video = {"type": "video_url", "video_url": {"url": file_id}}
    settings = {"nframes": [2, 4], "max_pixels": [50176], "frame_types": [[0, 1]]}
    answer = chat(http, messages=[{"role": "user", "content": [video, video]}], mm_processor_kwargs=settings)
    assert [medium["frames"] for medium in answer["usage"]["media"]] == [2, 4]
    assert [medium["options"]["max_pixels"] for medium in answer["usage"]["media"]] == [50176, 50176]
    assert "frame_types" in notes_of(answer)


def test_a_list_of_frames_with_its_rate(http: TestClient) -> None:
    file = BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "JPEG")
    frame = base64.b64encode(file.getvalue()).decode()
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frame},{frame},{frame}"}}
    for settings in ({"fps": [2.0]}, {"timestamps": [[0.0, 0.5, 1.0]]}, {"timestamps": [0.0, 0.5, 1.0]}):
        answer = chat(http, messages=[{"role": "user", "content": [video]}], mm_processor_kwargs=settings)
        assert answer["usage"]["media"][0]["timestamps"] == [0.0, 0.5, 1.0]
