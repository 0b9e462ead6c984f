"""Where the server under test is: a URL taken apart once, and resolved once.

Name resolution is not part of any request's latency, so it happens here and connections are made
to the numeric address. This module does not connect.
"""

import socket
import ssl
from urllib.parse import urlsplit

import msgspec

from capacity.load.errors import ServerUnusable, WrongOption

_API_ROOT = "/v1"


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """``prefix`` is the path before ``/v1``, without a trailing slash; ``headers`` go with all
    requests. ``ca_file`` is what TLS trusts besides the system's authorities.
    """

    url: str
    host: str
    port: int
    numeric_host: str = ""
    tls: bool = False
    prefix: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    ca_file: str | None = None

    def head(self, method: str, path: str, *, length: int = 0) -> bytes:
        """The head of an HTTP request for ``path`` below the prefix, with the blank line."""
        named = self.host if ":" not in self.host else f"[{self.host}]"
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {named}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if length:
            lines += ["content-type: application/json", f"content-length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def ssl_context(self) -> ssl.SSLContext | None:
        """
        Raises:
            WrongOption: ``ca_file`` holds no certificates.
        """
        if not self.tls:
            return None
        context = ssl.create_default_context()
        if self.ca_file is not None:
            try:
                context.load_verify_locations(self.ca_file)
            except OSError as error:  # ssl.SSLError is one
                reason = error.strerror or "no certificates in it"
                raise WrongOption(f"--ca-file {self.ca_file}: {reason}") from None
        return context


def parse_address(
    url: str, *, headers: tuple[tuple[str, str], ...] = (), ca_file: str | None = None
) -> Address:
    """``http://host:port``, with or without ``/v1`` at the end; the scheme may be left out.

    Raises:
        WrongOption: this is no URL of a server.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        port = parts.port
    except ValueError as error:
        raise WrongOption(f"URL {url!r}: {error}; write http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WrongOption(f"URL {url!r}: write http://HOST:PORT or https://HOST:PORT")
    if parts.query or parts.fragment or parts.username:
        raise WrongOption(f"URL {url!r}: leave out everything but scheme, host, port and path")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix(_API_ROOT)
    return Address(
        url=f"{parts.scheme}://{parts.netloc}{prefix}",
        host=parts.hostname,
        port=port or (443 if tls else 80),
        tls=tls,
        prefix=prefix,
        headers=headers,
        ca_file=ca_file,
    )


def resolve(address: Address) -> Address:
    """The same address with the first numeric host that accepts a connection.

    Raises:
        ServerUnusable: the name is unknown, or nobody accepts connections there.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServerUnusable(f"cannot resolve {address.host}: {error.strerror or error}") from None
    failure = "no address"
    for family, kind, protocol, _, endpoint in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(5.0)
            try:
                probe.connect(endpoint)
            except OSError as error:
                failure = error.strerror or str(error)
                continue
            return msgspec.structs.replace(address, numeric_host=str(endpoint[0]))
    raise ServerUnusable(
        f"nobody answers at {address.url} ({failure}); is the server up and the port right?"
    )
