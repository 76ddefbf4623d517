"""Requests through transformers' continuous batching, from an event loop.

The manager's thread runs the model; a request joins the batch at the next step and leaves it when
it is done. Here each request gets a queue of the tokens that are new, an admission (so many at
once, no more), its adapter and its draws.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..finetune.errors import BadInput
from .adapters import BASE, Mixer
from .sampling import Sampling, draws

__all__ = ["Busy", "Engine", "EngineDown"]


class Busy(Exception):
    """As many requests as are let in are in already.

    Attributes:
        retry_after: seconds after which a place is likely.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineDown(Exception):
    """The thread that generates has stopped, or a request failed in it."""


@dataclass
class _Job:
    adapter: str
    sampling: Sampling
    outputs: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    begun: float = field(default_factory=time.monotonic)
    complete: bool = False  # all of it that is wanted is there
    ended: bool = False  # the batch is rid of it
    failed: bool = False


class Engine:
    """Generates for many clients at once.

    Args:
        model: a transformers causal language model, on its device.
        mixer: of its adapters, if it has some.
        max_batch: requests in a batch.
        max_queue: requests that wait beside them; more are refused.
        context: longest prompt and reply together, in tokens; the model's own limit if None.
        cache_tokens: tokens that the key-value cache holds for all requests together; None: room
            for ``max_batch`` requests of 1024 tokens, and for one of ``context``.
    """

    def __init__(
        self,
        model: Any,
        mixer: Mixer | None = None,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        context: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        self.model, self.mixer = model, mixer
        self.max_batch, self.max_queue = max_batch, max_queue
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and limit is not None and context > limit:
            raise BadInput(f"context is {context}; the model takes {limit} tokens")
        self.context = context or min(limit or 4096, 8192)
        self.cache_tokens = cache_tokens or max(self.context, 1024 * max_batch)
        if self.cache_tokens < self.context:
            raise BadInput(
                f"cache_tokens is {self.cache_tokens}, less than one request of the context's "
                f"{self.context} tokens: raise it, or give a smaller --context"
            )
        self.jobs: dict[str, _Job] = {}
        self.done = self.failed = self.cancelled = self.tokens = 0
        self._seconds: deque[float] = deque(maxlen=32)
        self._manager: Any = None

    # -- starting and stopping --

    def start(self, timeout: float = 120.0) -> None:
        """Sets up the cache and the thread.

        Raises:
            BadInput: continuous batching does not take this model, or the cache does not fit.
        """
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        on_cuda = self.model.device.type == "cuda"
        page = 256 if on_cuda else 32  # FlashAttention's block tables want 256
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=math.ceil(self.cache_tokens / page) + 1,
            # A long prompt goes in by parts, so that replies under way do not stand still.
            max_batch_tokens=2048 if on_cuda else 256,
            max_requests_per_batch=self.max_batch,
            # Blocks are shared by the tokens that they were made of, whatever the adapter.
            allow_block_sharing=self.mixer is None,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=on_cuda,
        )
        # Drawing is ours: what is left for transformers to do is an argmax.
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=16)
        try:
            with torch.inference_mode():
                self._manager = self.model.init_continuous_batching(
                    generation_config=settings, continuous_batching_config=config
                )
                self._manager.logit_processor = draws(self._sampling_of)
                if self.mixer is not None:
                    self._hook = self.model.register_forward_pre_hook(self._rows, with_kwargs=True)
                self._manager.start()
        except (AttributeError, ValueError) as error:
            raise BadInput(f"continuous batching does not take this model: {error}") from error
        until = time.monotonic() + timeout
        while self._manager.batch_processor is None and self.alive and time.monotonic() < until:
            time.sleep(0.005)
        if self._manager.batch_processor is None:
            error = self._manager.background_thread_status.fatal_error
            hint = "; lower --cache_tokens" if isinstance(error, MemoryError) else ""
            raise BadInput(f"continuous batching does not take this model: {error}{hint}")

    def stop(self) -> None:
        """Ends the thread; requests in it fail."""
        if self._manager is not None and self._manager.is_running():
            self._manager.stop(block=True, timeout=30, hard_stop=True)
        if self.mixer is not None and self._manager is not None:
            self._hook.remove()
        self._manager = None

    @property
    def alive(self) -> bool:
        """Whether the thread that generates runs."""
        manager = self._manager
        return (
            manager is not None
            and manager.is_running()
            and manager.background_thread_status.fatal_error is None
        )

    # -- in the manager's thread --

    def _sampling_of(self, request_id: str) -> Sampling | None:
        job = self.jobs.get(request_id)
        return None if job is None else job.sampling

    def _rows(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before a forward pass: which adapter each of its tokens takes."""
        names: list[str] = []
        for request in self._manager.batch_processor.inputs_and_outputs.requests_in_batch:
            job = self.jobs.get(request.state.request_id)  # gone: cancelled, for one more step
            names += [BASE if job is None else job.adapter] * request.query_length
        self.mixer.set_rows(names)

    # -- in the event loop --

    def state(self) -> dict[str, int]:
        """How many requests run, wait and have been."""
        running = min(len(self.jobs), self.max_batch)
        return {
            "running": running,
            "waiting": len(self.jobs) - running,
            "max_running": self.max_batch,
            "max_waiting": self.max_queue,
            "done": self.done,
            "cancelled": self.cancelled,
            "failed": self.failed,
            "generated_tokens": self.tokens,
        }

    def admit(self) -> str:
        """Takes a place; give it back by :meth:`generate` or :meth:`leave`.

        Raises:
            Busy: there is none.
            EngineDown: nothing generates.
        """
        if not self.alive:
            raise EngineDown("the thread that generates has stopped; restart the server")
        if len(self.jobs) >= self.max_batch + self.max_queue:
            usual = sum(self._seconds) / len(self._seconds) if self._seconds else 5.0
            rounds = self.max_queue / self.max_batch
            raise Busy(min(60, max(1, math.ceil(usual * rounds / 2))))
        name = uuid.uuid4().hex
        self.jobs[name] = _Job(BASE, Sampling())
        return name

    def leave(self, name: str) -> None:
        """Gives a place back; what is still generated for it is cancelled."""
        job = self.jobs.pop(name, None)
        if job is None or self._manager is None or job.ended:
            return
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(name, None)
        self._manager.cancel_request(name)

    def complete(self, name: str) -> None:
        """Says that a reply is whole (a stop sequence came) before its iteration is left."""
        self.jobs[name].complete = True

    async def generate(
        self,
        name: str,
        prompt: Sequence[int],
        *,
        adapter: str = BASE,
        sampling: Sampling,
        max_tokens: int,
        ends: Sequence[int] = (),
    ) -> AsyncGenerator[list[int]]:
        """New tokens as they come, for a place that :meth:`admit` gave; the place is given back.

        Leaving the iteration early cancels the request: it is out of the batch at the next step.

        Args:
            prompt: token ids.
            adapter: PEFT's name of an adapter.
            max_tokens: most tokens of the reply.
            ends: tokens that end a reply; the one that did is the last that comes.

        Raises:
            EngineDown: the request failed, or everything has.
        """
        job = self.jobs[name]
        job.adapter, job.sampling = adapter, sampling
        try:
            self._manager.register_result_handler(name, job.outputs.put_nowait)
            accepted = self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=max_tokens,
                streaming=True,
                eos_token_id=list(ends),
            )
            if accepted is None:
                raise EngineDown("the thread that generates has stopped; restart the server")
            sent = 0
            while not job.ended:
                output = await job.outputs.get()
                job.ended = output.is_finished()
                if output.error is not None:
                    raise EngineDown(f"generation failed: {output.error}")
                new = output.generated_tokens[sent:]
                sent += len(new)
                self.tokens += len(new)
                job.complete = job.ended
                if new:
                    yield new
        except EngineDown:
            self.failed += 1
            job.failed = True
            raise
        finally:
            if job.complete and not job.failed:
                self.done += 1
                self._seconds.append(time.monotonic() - job.begun)
            elif not job.failed:
                self.cancelled += 1
            self.leave(name)


def check_limits(**values: int | None) -> None:
    """Raises :class:`BadInput` unless every given number is positive (``max_queue``: or 0)."""
    for name, value in values.items():
        least = 0 if name == "max_queue" else 1
        if value is not None and value < least:
            raise BadInput(f"{name} is {value}; it must be at least {least}")
