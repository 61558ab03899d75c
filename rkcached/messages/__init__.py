"""Turns chat messages into the text that a model reads, and its text into a reply.

`template` renders, with the built-in templates of `builtin`, in the Jinja2 sandbox of
`environment`; `sandbox` does so for templates that strangers wrote, in a child process. `markers`
keeps texts from becoming control tokens. `reply` splits what a model wrote into reasoning, content
and tool calls, in the form that `detection` finds. `tools` has the record of a tool, by which those
of a request and of a prompt's file are checked; it is made of `record`, `bounds` and `faults`, as
the requests of the API are. Engines, sources, the plan, serving and the API
call it.
"""
