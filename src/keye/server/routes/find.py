"""/v1/video/find: where in a video something happens, searched in as many looks as that takes; a stream of what it has
found so far, which can be stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.exports.find_record import find_record
from keye.exports.record import to_html
from keye.media.source.fetch import Source
from keye.media.subtitles import Subtitles
from keye.moments import FindEvent, FindNote, FindResult
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import add_note, current_notes
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, stream_events
from keye.server.openai.media_parts import named_video, open_video
from keye.server.openai.video_schemas import FindRequest
from keye.server.routes.frames import choose_subtitles, job_events, last_event
from keye.server.searches import Emit, FinishedSearch, Job
from keye.sessions.search.questions import ground_question, presence_question

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/video/find")
async def find(request: Request, body: FindRequest) -> Response:
    """Where something happens in a video of any length. With `stream` as server-sent events, at least one every two
    seconds: `started` with the id of the search, `waiting` until its turn, `progress`, `moments` found so far, and
    last the `result`. It ends when the client leaves; what was indexed stays for the next question."""
    context, owner = context_of(request), owner_of(request)
    context.check_base(body.model)
    named_video(body.video, context.opener(owner), body.preprocess_kwargs)  # mistakes are found before the search waits
    job = Job(owner, lambda job, emit: _search(context, owner, body, job, emit))
    if body.stream:
        return await stream_events(request, job_events(context.searches, job, _event_object))
    result = await cancel_on_disconnect(request, last_event(context.searches, job))
    return JSONResponse(_result_object(job, result))


@router.post("/v1/video/find/{find_id}/stop")
async def stop(request: Request, find_id: str) -> JSONResponse:
    """Ends a search soon: its stream ends with the result so far."""
    context_of(request).searches.stop(find_id, owner_of(request))
    return JSONResponse({"id": find_id, "object": "keye.find", "stopping": True})


@router.get("/v1/video/find/{find_id}/record", response_class=Response)
async def record(request: Request, find_id: str) -> Response:
    """The record of a search that has ended, as one HTML file: the video's digest, model, prompts, what was looked at
    and not, moments and their pictures. The last searches are kept, as long as their videos are."""
    context = context_of(request)
    search = context.finished_searches.get(find_id, owner_of(request))
    page = await cancel_on_disconnect(request, context.decode(_record, context, search))
    headers = {"Content-Disposition": 'attachment; filename="record.html"', "Cache-Control": "private, no-store"}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _record(context: Context, search: FinishedSearch) -> str:
    model = asdict(context.model.runtime.fingerprint)
    return to_html(find_record(search.result, search.source, model, search.prompts, search.settings))


def _event_object(job: Job, item: FindEvent) -> Mapping[str, Any]:
    return {"type": "result", **_result_object(job, item)} if isinstance(item, FindResult) else item.to_dict()


def _result_object(job: Job, result: FindResult) -> dict[str, Any]:
    notes = tuple(FindNote("request", text, "request") for text in current_notes())
    return {"object": "keye.find", "id": job.id, "result": replace(result, notes=(*result.notes, *notes)).to_dict()}


def _search(context: Context, owner: str, body: FindRequest, job: Job, emit: Emit) -> None:
    """Opens the video and searches it, in a thread. Its index counts as storage of its owner while it grows."""
    source, _ = open_video(body.video, context.opener(owner), body.preprocess_kwargs)
    options = dict(named_video(body.video, context.opener(owner), body.preprocess_kwargs).options)
    budget, most = body.budget, context.settings.find_tokens
    if budget is not None and budget > most:
        budget = most
        add_note(f"budget is lowered to the {most:,} tokens that a question may cost here")
    ready = None
    if context.library is not None:
        ready = context.library.find_index(source.path, options, scenes=body.scenes)
    path = ready or context.indexes.path(owner, source, {**options, "scenes": body.scenes, "effort": body.effort})
    try:
        stream = context.model.stream_find(
            source, body.event, budget=budget, top=body.top, threshold=body.threshold, effort=body.effort, index=path,
            seconds=context.settings.find_seconds, most_tokens=most,
            scenes=body.scenes, subtitles=_subtitles(context, owner, body, job, emit), media_options=options,
        )  # fmt: skip
        job.on_stop(stream.stop)
        with nullcontext() if context.library is None else context.library.hiding_paths():
            for item in stream:
                if ready is None:
                    context.indexes.account(owner, path)
                if isinstance(item, FindResult):
                    _keep(context, owner, body, source, job, item)
                emit(item)
    except ApiError:
        if ready is None:  # one of the library is not the owner's
            context.indexes.remove(owner, path)
        raise
    finally:
        if ready is None:
            context.indexes.release(path)


def _keep(context: Context, owner: str, body: FindRequest, source: Source, job: Job, result: FindResult) -> None:
    """Keeps a result for its record."""
    config = context.model.runtime.generation_config
    prompts = (presence_question(config, body.event), ground_question(config, body.event))
    settings = body.model_dump(include={"effort", "budget", "top", "scenes", "preprocess_kwargs"}, exclude_none=True)
    context.finished_searches.keep(job.id, FinishedSearch(owner, source, result, prompts, settings))


def _subtitles(context: Context, owner: str, body: FindRequest, job: Job, emit: Emit) -> Subtitles | Literal["none"]:
    if body.subtitles == "none":
        return "none"
    return choose_subtitles(context, owner, body.video, body.subtitles, job, emit) or "none"
