"""One request: its turn at the model, its prompt cache, its tokens.

`dispatcher` picks the fresh cache whose text the request begins with and has the model's worker
answer; `embeddings` does the same for vectors. The API calls it with requests that are already
checked.
"""
