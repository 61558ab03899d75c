"""Turns chat messages into the text that a model reads, and its text into a reply.

`template` renders, with the built-in templates of `builtin`; `sandbox` does so for templates that
strangers wrote, in a child process. `reply` splits what a model wrote into reasoning, content and
tool calls. Engines, sources, the plan, serving and the API call it.
"""
