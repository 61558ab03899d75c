"""Places of files and sockets: from flags, the environment, or defaults, in this order.

The environment has RKCACHED_* and systemd's *_DIRECTORY.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from rkcached.host import places

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Every path is absolute once it is here."""

    model_config = SettingsConfigDict(env_prefix="RKCACHED_", frozen=True, extra="ignore")

    manifest: Path = Field(default_factory=places.manifest)
    cache_dir: Path = Path()
    state_dir: Path = Path()
    socket: Path = Field(default_factory=places.socket_to_open)
    admin_socket: Path = Path()
    """The socket for changes; by default it lies beside the other one."""
    log_level: LogLevel = "info"
    listen: str = ""
    """TCP ports to open, as HOST:PORT, separated by spaces; the service's come from systemd."""
    open_loopback: bool = False
    """Whether TCP connections to a loopback address need no key."""

    def model_post_init(self, _: object) -> None:
        if "cache_dir" not in self.model_fields_set:
            object.__setattr__(self, "cache_dir", places.cache_dir(self.manifest))
        if "state_dir" not in self.model_fields_set:
            object.__setattr__(self, "state_dir", places.state_dir(self.cache_dir))
        if "admin_socket" not in self.model_fields_set:
            object.__setattr__(self, "admin_socket", self.socket.parent / places.ADMIN_NAME)

        for name in ("manifest", "cache_dir", "state_dir", "socket", "admin_socket"):
            absolute = os.path.abspath(getattr(self, name))  # noqa: PTH100 - it keeps links
            object.__setattr__(self, name, Path(absolute))

    def of_client(self) -> Self:
        """The settings of a client: the sockets where a daemon is found, unless they were given."""
        if "socket" in self.model_fields_set:
            return self

        socket = places.socket_to_ask()
        admin = self.admin_socket
        if "admin_socket" not in self.model_fields_set:
            admin = socket.parent / places.ADMIN_NAME

        return self.model_copy(update={"socket": socket, "admin_socket": admin})
