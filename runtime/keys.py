"""The cluster's key: one CURVE pair that every process of a cluster holds in a file.

With a key, bus sockets are encrypted and accept only holders of the same key, and KV connections
prove it by HMAC. Without one, everything must stay on loopback.
"""

import hashlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import zmq

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterKey:
    public: bytes  # Z85 text, as zmq wants it
    secret: bytes

    @classmethod
    def generate(cls) -> "ClusterKey":
        public, secret = zmq.curve_keypair()
        return cls(public=public, secret=secret)

    @classmethod
    def load(cls, path: Path) -> "ClusterKey":
        """
        Raises:
            ConfigError: the file is missing, unreadable or not a key.
        """
        try:
            secret = path.read_bytes().strip()
            return cls(public=zmq.curve_public(secret), secret=secret)
        except OSError as error:
            raise ConfigError(f"cannot read cluster key file {path}: {error.strerror}") from error
        except (zmq.ZMQError, ValueError) as error:
            raise ConfigError(f"{path} does not hold a cluster key") from error

    def save(self, path: Path) -> None:
        """Write the secret half, readable by this user only; an existing file is kept."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(self.secret + b"\n")

    def derive(self, purpose: str) -> bytes:
        """32 bytes for another protocol, such as the HMAC of KV connections."""
        return hashlib.sha256(purpose.encode() + b"\0" + self.secret).digest()


def load_key(path: Path | None) -> ClusterKey | None:
    """The key that the settings name, or None where they name none."""
    return None if path is None else ClusterKey.load(path)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_key_unless_loopback(host: str, key: ClusterKey | None, *, what: str) -> None:
    """
    Raises:
        ConfigError: ``host`` can be reached from other machines and there is no key.
    """
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"{what} would listen on {host} without authentication: set a cluster key "
            "(--cluster-key-file) or bind to 127.0.0.1"
        )
