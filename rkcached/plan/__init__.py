"""What each prompt cache must be, what has to be done for that, and why.

Pure: no file, clock or event is read here.

`fingerprint` names everything that makes a cache what it is, `desired` computes the fingerprint of
every declared prompt, and `planner` compares them with the store. The reconciler carries the plan
out; `rkcached plan` prints it.
"""
