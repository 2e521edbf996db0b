"""Jobs of the server on a loaded model, one after the other in one thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from keye.engine.engine import Keye
from keye.engine.generate import Decoding
from keye.engine.prompt import Prompt, Room
from keye.engine.sampling import Sampler, StopText
from keye.server.jobs import Delta, Ended, Event, Finished, Job, Progress, TokenProb
from keye.tokenizer import StreamDecoder


class SerialEngine:
    """Works on one job at a time; a closed job ends at its next token."""

    def __init__(self, model: Keye) -> None:
        self.model = model
        self._pool = ThreadPoolExecutor(1, "engine")

    def start(self) -> None:
        """Nothing to start."""

    async def drain(self, seconds: float) -> None:
        """Nothing runs on."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def gauges(self) -> Mapping[str, float]:
        return {}

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException](), threading.Event()

        def work() -> None:
            try:
                for event in self._events(job):
                    if gone.is_set():
                        return
                    loop.call_soon_threadsafe(queue.put_nowait, event)
            except Exception as error:  # noqa: BLE001 - handed over to the request
                loop.call_soon_threadsafe(queue.put_nowait, error)

        self._pool.submit(work)
        try:
            while True:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            gone.set()

    def _events(self, job: Job) -> Iterator[Event]:
        model, begin = self.model, time.perf_counter()
        yield Progress("decode", 0, 1)
        room = Room(model.config.text.max_position_embeddings, job.params.max_tokens)
        prompt = model._builder.lay_out(job.prompt, room=room)
        count = 0
        prepared = time.perf_counter()
        for index in range(job.n):
            decoding = Decoding(model.model, mode=job.attention or model.attention)
            decoding.prefill(prompt)
            for event in self._choice(job, index, decoding):
                count += event.tokens if isinstance(event, Delta) else 0
                yield event
        yield self._finished(job, prompt, count, {"media": prepared - begin, "decode": time.perf_counter() - prepared})

    def _choice(self, job: Job, index: int, decoding: Decoding) -> Iterator[Event]:
        model, params = self.model, job.params
        sampler, reply = Sampler(params), list[int]()
        decoder, stop = StreamDecoder(model.tokenizer, skip_special=job.skip_special), StopText(params.stop)
        guide = job.guide.fork() if job.guide else None
        eos = model.generation.eos_token_ids or model.config.eos_token_ids
        while len(reply) < params.max_tokens and not stop.stopped:
            if reply:
                decoding.feed(reply[-1])
            logits = decoding.logits
            mask = guide.mask() if guide else None
            token = sampler(logits if mask is None else logits.masked_fill(~mask, float("-inf")), reply)
            if guide:
                guide.advance(token)
            if token in eos and not job.ignore_eos:
                break
            reply.append(token)
            probs = () if job.logprobs is None else (self._prob(logits, token, job.logprobs),)
            yield Delta(index, stop.push(decoder.push(token)), 1, probs)
        else:
            if not stop.stopped:
                yield Delta(index, stop.push(decoder.finish()) + stop.finish(), 0)
                yield Ended(index, "length")
                return
        if not stop.stopped:
            yield Delta(index, stop.push(decoder.finish()) + stop.finish(), 0)
        yield Ended(index, "stop")

    def _prob(self, logits: torch.Tensor, token: int, top: int) -> TokenProb:
        logs = logits.float().log_softmax(-1)

        def one(index: int, others: tuple[TokenProb, ...] = ()) -> TokenProb:
            raw = self.model.tokenizer.token_bytes(index)
            return TokenProb(raw.decode("utf-8", "replace"), raw, float(logs[index]), others)

        return one(token, tuple(one(int(i)) for i in logs.topk(top).indices) if top else ())

    def _finished(self, job: Job, prompt: Prompt, count: int, seconds: Mapping[str, float]) -> Finished:
        plans = tuple({"kind": item.kind, **item.plan_dict()} for item in prompt.media)
        return Finished(
            prompt.token_ids.shape[0], prompt.media_tokens, count, 0, plans,
            {name: round(value, 4) for name, value in seconds.items()}, job.attention or self.model.attention,
        )  # fmt: skip
