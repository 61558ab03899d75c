"""The clerk of a harbour: what the clients of the other APIs ask, and what the model answers."""

from __future__ import annotations

TEXT = "You are the clerk of a harbour. You answer in one sentence.\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SCRIPT = {
    "weather?": f"<think>\nI should look.\n</think>\n\nLet me see.\n{CALL}\n{CALL}",
    "-5 C": "It is cold.",
    "as JSON": '{"city": "Oslo", "degrees": -5}',
    "by name": '{"name": "weather", "arguments": {"city": "Oslo"}}',
    "by a call": '{"name": "final_result", "arguments": {"city": "Oslo", "degrees": -5}}',
    "nothing": "",
}
