"""Inference libraries behind one port.

`base` is the port, `registry` the table of what the program must know of each engine without
loading it; `llamacpp`, `rkllm` and `memory` are the engines themselves. Every room above uses the
port's records and the table; only a worker process calls an engine.
"""
