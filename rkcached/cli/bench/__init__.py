"""`rkcached bench` and `rkcached compare`: what the prompt caches gain on the running daemon.

`asking` makes the states, `measuring` measures one prompt and `series` one after the other. `alone`
and `direct` run the engine without the daemon, `sweep` stores prompts of chosen lengths, `runner`
puts them together; `results` is the file format, `table` and `plots` show it.
"""
