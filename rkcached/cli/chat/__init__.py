"""`rkcached chat`: one question, or a conversation at a terminal.

`conversation` asks and shows an answer as it comes, `terminal` reads lines and obeys the commands
that begin with a slash, `command` chooses between the two.
"""
