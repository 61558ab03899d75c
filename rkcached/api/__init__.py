"""OpenAI's API and our own, over HTTP on a Unix socket.

`server` accepts connections, `exchange` gives each request its id and log line, and `endpoints`
finds its handler in `routes` or `cache_routes`. `requests` and `responses` are the bodies, with
`chat_messages` and `variables` as parts of a chat's. `prepare` makes of a request a job for serving
(a `conversation` is rendered), and `writer` words the answer. `status` is the
document of the daemon's state, `page` and `metrics` show it to browsers and Prometheus, and `words`
has its words, which the command line shares. Only the daemon and the command line call this room.
"""
