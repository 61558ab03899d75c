"""Workers: each is a process that hosts one model, so that native code cannot harm the daemon.

`supervisor` decides when a worker is started, and what becomes of it when it dies; `process` holds
its process, `child` is what runs in that, and `protocol` is what they send each other. `pool` keeps
the workers of all models, `gate` gives them their turns. Serving and the reconciler call this room.
Only `child` may import an engine.
"""
