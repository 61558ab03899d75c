"""Our files: prompt caches, their texts and sidecars.

This room is the only one that writes to the store.

`store` publishes, adopts and removes whole artifacts. It has a part for each other kind of file:
`staging`, `verdicts`, `retired` and `quarantine`, which all write through its one `writer`, the
owner of the lock. `scan` finds out what is there; `marks` says which folder is a store at all;
`garbage` is what may be removed. The reconciler calls it, and so do the commands that only read.
"""
