"""Checks before every request (API key, size of the body), one line of log for each, no traceback for the client."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cuma_ds.serving.protocol import error_content
from cuma_ds.serving.scheduler import Job

logger = logging.getLogger(__name__)

_PATHS = ("/v1/chat/completions", "/v1/models", "/health")


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        api_key: asked for on every path but ``/health``; None asks for none.
        max_body: bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the job that the application leaves in ``scope["state"]`` ends with it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["id"] = f"chatcmpl-{secrets.token_hex(12)}"
        started, status, size = time.monotonic(), 0, 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the request body is larger than {self.max_body} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", state["id"].encode()))
            await send(message)

        error: Exception | None = None
        try:
            if scope["path"] != "/health" and not self._knows_key(scope):
                content = error_content(
                    "the API key is missing or wrong", "authentication_error", code="invalid_api_key"
                )
                await JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})(scope, limited, noted)
            else:
                await self.app(scope, limited, noted)
        except Exception as mistake:
            error = mistake
            if not status:
                content = error_content(
                    "the server failed to answer this request", "server_error", code="internal_error"
                )
                await JSONResponse(content, 500)(scope, limited, noted)
        finally:
            job = state.get("job")
            if job is not None:
                job.cancel()
            if scope["path"] != "/health" or error is not None:
                path = scope["path"] if scope["path"] in _PATHS else "other"  # may hold anything
                facts = {"id": state["id"], "method": scope["method"], "path": path, "status": status}
                facts["seconds"] = round(time.monotonic() - started, 4)
                logger.info(
                    "request", exc_info=error, extra={"facts": facts | (_facts(job) if job is not None else {})}
                )

    def _knows_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, key = (*given.split(maxsplit=1), b"", b"")[:2]
        # Schemes may be in any case (RFC 9110). Keys are compared in a time that tells nothing about them.
        return secrets.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def _facts(job: Job) -> dict[str, object]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": len(job.tokens),
        "finish": job.finish or "cancelled",
        "waited": None if job.waited is None else round(job.waited, 4),
    }
