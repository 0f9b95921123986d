"""The socket of a server. Nothing heavy is imported, so that a port in use is reported before models are loaded."""

import errno
import socket

from ..errors import InputError
from .settings import ServeRequest


def listen(request: ServeRequest) -> socket.socket:
    """A socket that listens on the host and port of a server.

    Args:
        request: the server's settings.

    Raises:
        InputError: the host is unknown or not of this machine, or the port is in use or not allowed.
    """
    host, port = request.host, request.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that is too long
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while attempting")[0]
        if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
            text = f"--host {host} is not an address of this machine ({reason}): give 127.0.0.1, or 0.0.0.0 for all"
            raise InputError(f"{text} of its addresses.") from None
        raise InputError(f"cannot listen on {host} port {port} ({reason}): give another --port.") from None
