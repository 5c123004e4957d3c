"""What a conversation is: the check that every row passes before a chat template sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .image_parts import RowImages, place_images, wrong_part
from .malformed import MalformedRow, kind

PRETRAIN = "pretrain"  # the whole row is one text, without chat (XTuner's word)
ROLES = ("system", "developer", "user", "assistant", "tool")
# Role names of the ShareGPT shape, {"conversations": [{"from": "human", "value": "Hello"}, ...]}.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}


def check_conversation(row: Any, arrow_nulls: bool = False, image_root: str | Path | None = None) -> dict[str, Any]:
    """The conversation in a row, as chat templates want it.

    Args:
        row: a mapping with `messages` and perhaps `tools` and `chat_template_kwargs`. `tools`, a message and its
            `tool_calls` may be JSON text. A `conversations` list of from/value pairs (ShareGPT) is taken for messages.
            Images in all the shapes of image_parts.py.
        arrow_nulls: the row went through an Arrow table, which gives every struct the keys of all others, with null:
            nulls inside of tools and arguments are dropped too, not only those of whole keys of a message.
        image_root: folder of relative paths of images.

    Returns:
        A dict with `messages`, `tools` (None without) and `chat_template_kwargs` ({} without). A message holds no key
        with null but `content`; text parts are joined; `loss` (bool) is there where the row had `loss` or `weight`;
        `images` where it has any, and `<image>` in its text for each.

    Raises:
        MalformedRow: says what is wrong.
    """
    if not isinstance(row, Mapping):
        raise MalformedRow("not an object", f"the row is {kind(row)}; it must be an object with 'messages'.")
    messages = row.get("messages")
    if messages is None and isinstance(row.get("conversations"), list):
        messages = [_from_sharegpt(turn) for turn in row["conversations"]]
    if messages is None:
        keys = ", ".join(map(repr, row)) or "none"
        raise MalformedRow("no messages", f"there is no 'messages' in the row (keys: {keys}); give it a list of turns.")
    if not isinstance(messages, list):
        raise MalformedRow("messages not a list", f"'messages' is {kind(messages)}; it must be a list of turns.")
    if not messages:
        raise MalformedRow("empty messages", "'messages' is empty; remove the row or give it at least one turn.")
    template_kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(template_kwargs, dict):
        raise MalformedRow(
            "malformed chat_template_kwargs", f"'chat_template_kwargs' is {kind(template_kwargs)}; make it an object."
        )
    row_images = RowImages(row, image_root)
    checked = [_check_message(number, message, arrow_nulls, row_images) for number, message in enumerate(messages, 1)]
    row_images.check_all_taken()
    if any(message["role"] == PRETRAIN for message in checked) and len(checked) > 1:
        raise MalformedRow("unknown role", f"a turn of role {PRETRAIN!r} is a row of its own, without other turns.")
    return {
        "messages": checked,
        "tools": _check_tools(row.get("tools"), arrow_nulls),
        "chat_template_kwargs": _without_nulls(template_kwargs) if arrow_nulls else template_kwargs,
    }


def _check_message(number: int, message: Any, arrow_nulls: bool, row_images: RowImages) -> dict[str, Any]:
    where = f"message {number}"
    message = _from_json_text(message, where, "message not an object")
    if not isinstance(message, dict):
        raise MalformedRow("message not an object", f"{where} is {kind(message)}; it must have 'role' and 'content'.")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = message.get("role")
    if role not in (*ROLES, PRETRAIN):
        found = "no role" if role is None else f"role {role!r}"
        raise MalformedRow("unknown role", f"{where} has {found}; use one of {', '.join(ROLES)}.")
    if "tool_calls" in message:
        calls = _from_json_text(message.pop("tool_calls"), f"{where}: 'tool_calls'", "malformed tool_calls")
        _check_tool_calls(calls, where, role)
        if calls:
            message["tool_calls"] = _without_nulls(calls) if arrow_nulls else calls
    place_images(message, where, row_images)
    _check_content(message, where)
    loss = _loss_flag(message, where)
    return message if loss is None else message | {"loss": loss}


def _check_content(message: dict[str, Any], where: str) -> None:
    """Text parts become one text: a template for text alone would drop a list without a word."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise wrong_part(part, where)
        message["content"] = "".join(part["text"] for part in content)
    elif content is None:
        if "tool_calls" not in message:
            raise MalformedRow("no content", f"{where} has no content; only a turn with 'tool_calls' may leave it out.")
    elif not isinstance(content, str):
        raise MalformedRow(
            "content of the wrong type", f"{where} has content that is {kind(content)}; make it text or text parts."
        )


def _check_tool_calls(calls: Any, where: str, role: str) -> None:
    def malformed(problem: str) -> MalformedRow:
        return MalformedRow("malformed tool_calls", f"{where}: {problem}")

    if not isinstance(calls, list):
        raise malformed(f"'tool_calls' is {kind(calls)}; it must be a list of calls.")
    if calls and role != "assistant":
        raise malformed(f"a turn of role {role!r} has 'tool_calls'; only the assistant calls tools.")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise malformed("a tool call has no function name; write {'function': {'name': ..., 'arguments': {...}}}.")
        arguments = _from_json_text(function.get("arguments", {}), f"{where}: 'arguments'", "malformed tool_calls")
        if not isinstance(arguments, dict):
            raise malformed(f"the arguments of {function['name']!r} are {kind(arguments)}; make them an object.")


def _check_tools(tools: Any, arrow_nulls: bool) -> list[dict[str, Any]] | None:
    tools = _from_json_text(tools, "'tools'", "malformed tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MalformedRow("malformed tools", "'tools' must be a list of JSON schemas of functions.")
    return _without_nulls(tools) if arrow_nulls else tools


def _loss_flag(message: dict[str, Any], where: str) -> bool | None:
    """Takes `loss` (true, false) or `weight` (1, 0) out of the message; None where there is neither."""
    flags = {key: message.pop(key) for key in ("loss", "weight") if key in message}
    for key, value in flags.items():
        if value not in (0, 1):
            raise MalformedRow("malformed loss flag", f"{where} has {key} {value!r}; only on (true, 1) and off exist.")
        if value and message["role"] != "assistant":
            raise MalformedRow(
                "malformed loss flag",
                f"{where} asks for a loss on a turn of role {message['role']!r}; only assistant turns are learned.",
            )
    return all(flags.values()) if flags else None


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # the check of messages says what is wrong with it
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def _from_json_text(value: Any, where: str, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise MalformedRow(reason, f"{where} is text that is not JSON ({error}); give it as an object.") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
