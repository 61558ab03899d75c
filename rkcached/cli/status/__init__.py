"""`rkcached status`: `command` chooses.

`show` has the table, `live` the live view, `picture` draws it.
"""
