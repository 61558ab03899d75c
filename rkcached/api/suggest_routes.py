"""HTTP routes of suggestions: beginnings that requests repeat and that no prompt cache has.

Who asks on the socket for everyone is shown what he repeats himself, and no sign of what others
do. A prompt that is stored serves everybody, so that is a change like others.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from rkcached.api.callers import viewer_of
from rkcached.api.endpoints import endpoint
from rkcached.api.exchange import answer, read_record
from rkcached.api.requests import SuggestRequest
from rkcached.api.responses import SuggestedPrompt, SuggestionList
from rkcached.api.status import suggested, suggested_prompt
from rkcached.serving.learning import Learning


class SuggestApi:
    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    @endpoint(
        "GET",
        "/v1/suggestions",
        summary="Beginnings of your requests that would be worth a prompt; on the socket for "
        "changes, of everybody's.",
        answers={200: SuggestionList},
    )
    async def _list(self, request: Request) -> Response:
        return answer(SuggestionList(data=suggested(self._learning, viewer_of(request))))

    @endpoint(
        "POST",
        "/v1/suggestions",
        summary="Store the text of the next request with this beginning as a prompt.",
        body=SuggestRequest,
        answers={202: SuggestedPrompt},
        errors=(404, 409),
        admin=True,
    )
    async def _store(self, request: Request) -> Response:
        body = await read_record(SuggestRequest, request)
        suggestion, wish = self._learning.wish(body.id, body.name)
        return answer(suggested_prompt(suggestion, wish), status=202)
