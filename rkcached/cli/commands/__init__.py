"""Declares the commands: names, options, help. Nothing is done here.

The program starts here for each command, also for help and completion, so what a command needs is
imported when it runs. Only `main` uses these modules.
"""
