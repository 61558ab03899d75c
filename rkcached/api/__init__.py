"""OpenAI's API and our own, over HTTP on a Unix socket.

`server` serves, `routes` and `cache_routes` have the endpoints, `requests` and `responses` are the
bodies, `prepare` turns a body into a job for serving, and `writer` streams the answer. Only the
daemon calls this room.
"""
