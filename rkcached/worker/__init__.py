"""Workers: the two ends of one protocol.

The child hosts an engine, the supervisor keeps the child.
"""
