"""What each prompt cache must be, what to do for that, and why.

`fingerprint` names everything that makes a cache what it is, `desired` computes the fingerprint of
every declared prompt, and `planner` compares them with the store. `records` are its input and its
output. `worker_model` says what a worker hosts. Pure: no file, clock or event is read here.

The reconciler calls it and carries the plan out; `rkcached plan` prints it. The rooms above use its
records.
"""
