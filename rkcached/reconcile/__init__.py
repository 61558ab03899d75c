"""Look, plan, act: makes the store what the manifest declares, and keeps it so.

`loop` waits for events, has `observer` look at manifest, sources and store, carries the plan out,
and starts one build at a time (`builder`). `snapshot` is what the rooms above may see of it. The
daemon starts it; serving and the API read its snapshot and ask it for builds.
"""
