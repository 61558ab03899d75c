"""`python -m rkcached` is `rkcached`.

Started so, Python looks into the current folder for every module, before its own library. What it
took from there until now cannot be helped (`python -Im rkcached` looks nowhere else); from here on
it looks there no more.
"""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):  # noqa: PTH109 - as there
    del sys.path[0]

# Only for the daemon: no other command has systemd wait, and all should start quickly.
if sys.argv[1:2] == ["run"]:
    from rkcached.host.systemd import asking_for_time

    with asking_for_time():
        from rkcached.cli.main import main
else:
    from rkcached.cli.main import main

main()
