"""Wraps what Linux and systemd give us. Nothing here knows of models or prompts.

Files: `watch` reports changes at the places that `trails` finds, by inotify or, where that cannot
be, by `poll`; `digests` remembers SHA-256 of files; `access` explains why a file cannot be read;
`beneath` walks and removes folders without leaving them; `disk` writes files that survive a power
cut, and measures free space.
The service: `systemd` reports to it and takes its sockets; `unit` is the installed unit; `journal`
and `logs` write log events. The rest: `places` and `settings` find where things are, `isolated`
starts children that run our code only, `unix_http` is HTTP over a Unix socket.

Every room may call it; it calls none but `errors`.
"""
