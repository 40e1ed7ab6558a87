"""JSON over HTTP with concurrent requests, for a vLLM server. Needs the extra ``folora[vllm]``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from folora.errors import ServerError
from folora.runtime.extras import needed_by

with needed_by("sampling.server", "vllm"):
    import httpx2
    from anyio.from_thread import start_blocking_portal

KEY = "VLLM_API_KEY"  # the variable that `vllm serve` reads
CONNECT_S, ANSWER_S = 10.0, 3600.0  # timeouts; a request may be queued for long


def request_json(method: str, url: str, requests: Sequence[Any]) -> list[Any]:
    """Send requests concurrently and return the parsed JSON answers. Raises ServerError.

    When one fails, or at Ctrl-C, the others are cancelled. The event loop runs in another thread, because
    a notebook's thread already has one.
    """
    with start_blocking_portal() as portal:
        try:
            return portal.call(_all, method, url, requests)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def _all(method: str, url: str, requests: Sequence[Any]) -> list[Any]:
    key = os.environ.get(KEY)
    async with (
        httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=len(requests)),
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(_one(client, method, url, request)) for request in requests]
    return [task.result() for task in tasks]


async def _one(client: httpx2.AsyncClient, method: str, url: str, request: Any) -> Any:
    try:
        answer = await client.request(method, url, json=request)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServerError(
            f"{url} does not answer ({str(error) or type(error).__name__}). Check that `vllm serve` is running "
            "there and rerun the command; finished batches are on disk"
        ) from error
    if answer.status_code != httpx2.codes.OK:
        hint = f"; set its API key in {KEY}" if answer.status_code in (401, 403) else ""
        raise ServerError(f"{url} answers {answer.status_code}: {answer.text[:300]}{hint}")
    try:
        return answer.json()
    except ValueError:
        raise ServerError(f"{url} does not answer with JSON: {answer.text[:100]!r}") from None
