"""The commands.

`main` declares them; each lives in a module of its own name and is imported when it runs.

Commands that ask the daemon do so through `client`; those that look for themselves use the rooms
below without it.
"""
