"""Workers: each is a process that hosts one model, so that native code cannot harm the daemon.

`supervisor` starts, watches and ends one process, `child` is what runs in it, and `protocol` is
what they send each other. `pool` keeps the workers of all models, `gate` gives them their turns.
Serving and the reconciler call this room. Only `child` may import an engine.
"""
