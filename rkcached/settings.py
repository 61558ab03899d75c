"""Where things are: from flags, the environment (RKCACHED_*, systemd's *_DIRECTORY), or defaults. In this order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]


def _default_manifest() -> Path:
    here = Path("manifest.yaml")
    return here if here.exists() else Path("/etc/rkcached/manifest.yaml")


def _default_cache_dir() -> Path:
    return Path(os.environ.get("CACHE_DIRECTORY", "cache").split(":")[0])


def _default_state_dir() -> Path:
    return Path(os.environ.get("STATE_DIRECTORY", "state").split(":")[0])


def _default_socket() -> Path:
    folder = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0] or os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(folder or "/run/rkcached") / "rkcached.sock"


class Settings(BaseSettings):
    """Every path is absolute once it is here."""

    model_config = SettingsConfigDict(env_prefix="RKCACHED_", frozen=True, extra="ignore")

    manifest: Path = Field(default_factory=_default_manifest)
    cache_dir: Path = Field(default_factory=_default_cache_dir)
    state_dir: Path = Field(default_factory=_default_state_dir)
    socket: Path = Field(default_factory=_default_socket)
    admin_socket: Path = Path()
    """For changes; by default beside the other one."""
    log_level: LogLevel = "info"

    def model_post_init(self, _: object) -> None:
        if "state_dir" not in self.model_fields_set and "STATE_DIRECTORY" not in os.environ:
            object.__setattr__(self, "state_dir", self.cache_dir.parent / "state")
        if "admin_socket" not in self.model_fields_set:
            object.__setattr__(self, "admin_socket", self.socket.parent / "admin.sock")
        for name in ("manifest", "cache_dir", "state_dir", "socket", "admin_socket"):
            object.__setattr__(self, name, Path(os.path.abspath(getattr(self, name))))  # noqa: PTH100 - keeps links
