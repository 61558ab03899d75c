"""Look, plan, act: makes the store what the manifest declares, and keeps it so.

`loop` waits until something wakes it (`wake`), and looks: `observer` compares manifest, sources and
store; `publisher` makes a `snapshot` of what it saw; `actions` adopt, retire and remove;
`build_queue` holds the builds, ordered by `demand` and held back by `build_times`; `build_runner`
and `builder` carry them out one at a time, and `prefills` has each done by a worker, from a prompt
cache that begins alike (`bases`) where there is one.
`failures` remembers what went wrong, `waiters` who waits for a build, `announcer` what the log and
the listeners know; `surplus` stops workers that nobody needs.

The daemon starts it. Serving and the API read its snapshot and ask it for builds; commands use the
observer alone.
"""
