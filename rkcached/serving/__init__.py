"""One request: its turn at the model, its prompt cache, its tokens.

`dispatcher` takes a `job`, waits for its turn, picks the fresh cache whose text the request begins
with, and has the model's worker answer; `pooling` does the same for vectors and scores. `report`
has the figures of an answer, `failures` the errors as clients get them, `models` finds a model by
its name. Only the API calls this room, with requests that are already checked.
"""
