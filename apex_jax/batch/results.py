"""Output lines: the OpenAI batch shape with token_ids, and what of it a resumed job reads back.

Owns the one JSON encoding of a result or failure. ASCII only, so that a reader which splits on
Unicode line separators still finds one line each.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apex_jax.batch.flow import Choice, Finished
from apex_jax.batch.id_index import id_key, line_key
from apex_jax.batch.lines import BadLine, BatchRequest
from apex_jax.request import FinishReason
from apex_jax.text.chat import Chat

DUPLICATE = "duplicate_custom_id"
# Every output line begins so; a torn last line that does not is no line of ours.
LINE_START = b'{"custom_id": '


class NotAResultError(ValueError):
    """A line that no job of this program wrote. is_json: it is whole JSON, so no torn line."""

    def __init__(self, message: str, *, is_json: bool) -> None:
        super().__init__(message)
        self.is_json = is_json


@dataclass(frozen=True)
class FinishedLine:
    """One line of an output file, as far as resuming needs it.

    offset, num_bytes: where it stands in the file, its end included. line: of the input.
    custom_id: None for a line whose id could not be read. failed: it is an error line.
    code: of the error. sampling: the resolved parameters, None for a line that was no request.
    """

    offset: int
    num_bytes: int
    custom_id: str | None
    line: int
    failed: bool
    code: str | None
    request_sha256: str
    job_sha256: str
    sampling: Mapping[str, Any] | None

    @property
    def is_by_line(self) -> bool:
        """True where the line number, not the custom_id, says which input line this answers."""
        return self.custom_id is None or self.code == DUPLICATE

    @property
    def key(self) -> int:
        if self.custom_id is None or self.code == DUPLICATE:
            return line_key(self.line)
        return id_key(self.custom_id)


def encode_result(
    request: BatchRequest,
    finished: Finished[Any],
    logprobs: Sequence[Mapping[str, Any]],
    model_name: str,
    job_sha256: str,
    created_sec: float,
) -> bytes:
    """Return the output line of a finished request; `text` is null where there is no tokenizer.

    logprobs: of each choice the fields that say what it asks for of those.
    """
    outputs = [choice.output for choice in finished.choices]
    name = hashlib.sha256(f"{request.custom_id}:{request.sha256}".encode()).hexdigest()[:24]
    num_prompt = len(outputs[0].request.prompt_token_ids)
    num_output = sum(len(output.token_ids) for output in outputs)
    is_chat = isinstance(request.prompt, Chat)
    kind, prefix = ("chat.completion", "chatcmpl") if is_chat else ("text_completion", "cmpl")
    body = {
        "id": f"{prefix}-{name}",
        "object": kind,
        "created": int(created_sec),
        "model": model_name,
        "choices": [
            {"index": index, **_choice_fields(choice, is_chat=is_chat), **of_choice}
            for index, (choice, of_choice) in enumerate(
                zip(finished.choices, logprobs, strict=True)
            )
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
    }
    response = {"status_code": 200, "request_id": f"req-{name}", "body": body}
    return _encode(request.custom_id, response, None, _origin(request, job_sha256))


def encode_failed_request(request: BatchRequest, message: str, job_sha256: str) -> bytes:
    """Return the output line of a well-formed request that cannot run."""
    error = {"code": "invalid_request", "message": message}
    return _encode(request.custom_id, None, error, _origin(request, job_sha256))


def encode_bad_line(bad: BadLine, job_sha256: str) -> bytes:
    """Return the output line of an input line that is no request."""
    origin = {"line": bad.line, "request_sha256": bad.sha256, "job_sha256": job_sha256}
    message = f"line {bad.line}: {bad.message}"
    return _encode(bad.custom_id, None, {"code": bad.code, "message": message}, origin)


def _choice_fields(choice: Choice, *, is_chat: bool) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": choice.text}}
    return {
        **(said if is_chat else {"text": choice.text}),
        "token_ids": list(choice.output.token_ids),
        "finish_reason": FinishReason(choice.output.finish_reason).value,
        "stop_reason": choice.stop_reason,
    }


def _origin(request: BatchRequest, job_sha256: str) -> dict[str, Any]:
    """Where a line came from; `sampling` lets a resumed job name the parameter that changed."""
    return {
        "line": request.line,
        "request_sha256": request.sha256,
        "job_sha256": job_sha256,
        "sampling": asdict(request.sampling),
    }


def _encode(
    custom_id: str | None,
    response: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None,
    origin: Mapping[str, Any],
) -> bytes:
    item = {"custom_id": custom_id, "response": response, "error": error, "apex": origin}
    return json.dumps(item).encode("ascii") + b"\n"


def decode_line(data: bytes, offset: int) -> FinishedLine:
    """Read an output line back. Raises NotAResultError for one that this program did not write."""
    try:
        item = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise NotAResultError("not JSON", is_json=False) from problem
    try:
        origin, error = item["apex"], item["error"]
        line = FinishedLine(
            offset=offset,
            num_bytes=len(data),
            custom_id=item["custom_id"],
            line=int(origin["line"]),
            failed=item["response"] is None,
            code=None if error is None else error["code"],
            request_sha256=origin["request_sha256"],
            job_sha256=origin["job_sha256"],
            sampling=origin.get("sampling"),
        )
        int(line.request_sha256[:16], 16)
    except (ValueError, KeyError, TypeError) as problem:
        raise NotAResultError(f"no field {problem}", is_json=True) from problem
    return line
