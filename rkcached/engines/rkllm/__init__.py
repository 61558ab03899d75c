"""Rockchip's RKLLM runtime: what a library file is, its binary interface, and the engine on it."""
