"""A watch over the other processes of a run: when one of them ends, the rest end within seconds, with one line.

Without it a collective fails late (after distributed_timeout_minutes) or with a page of traceback. So every rank keeps one
connection to rank 0, over which nothing is sent while all is well. The kernel closes it when a process ends, however that
ends, and rank 0 tells the others. A rank that ends with an error sends that first: so a failure can be told from a process
that was killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch.distributed import DistError, PrefixStore, Store

from megatron_ring.errors import Interrupted, RingError
from megatron_ring.runtime.orphans import PEER_IS_GONE, launcher_is_gone

log = logging.getLogger("megatron_ring")

GRACE = 5.0
"""Seconds in which a rank may end by itself and close its files, before it is killed."""
_NEWS = 3.0
"""Seconds to wait for news of a peer after a collective has failed, which may be that peer's doing."""
_CONNECT = 30.0
_SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A node that loses power closes no connection: it counts as gone after 25 seconds without an answer."""
_BROKEN = re.compile(
    "gloo|Connection (closed|reset) by peer|Broken pipe|Connection refused|Connection was likely closed|NCCL|Socket"
)


class News(NamedTuple):
    """How a rank ended. Example: ``News("gone", 3, "process 411 on node7", 75)``."""

    kind: str
    """``gone``: killed, without a message. ``failed``: printed a traceback. ``error``: printed its line. ``done``."""
    rank: int
    where: str
    code: int

    def encode(self) -> bytes:
        return json.dumps(self).encode() + b"\n"


_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked child: its copies would keep a connection open after the rank has been killed."""
    for copy in list(_open):
        copy.close()


os.register_at_fork(after_in_child=_close_copies)


class Watch:
    """One rank's side of the watch. All ranks are connected to rank 0, which forwards the news.

    Example: ``with Watch(store, rank=1, world_size=8) as watch, watch.reporting(): train()``.
    """

    @classmethod
    def open(cls, store: Store, rank: int, world_size: int) -> Watch | None:
        """A watch; None, with a warning, if rank 0 cannot be reached."""
        try:
            return cls(store, rank, world_size)
        except OSError as error:
            log.warning(
                "rank %d cannot reach the watch of rank 0 (%s): that a peer is gone is noticed when a collective "
                "fails, or after distributed_timeout_minutes",
                rank,
                error,
            )
            return None

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Waits until rank 0 has opened its watch."""
        self._store = PrefixStore("peers", store)
        self._rank, self._world = rank, world_size
        self._where = f"process {os.getpid()} on {socket.gethostname()}"
        self._heard = threading.Event()
        self._left = threading.Event()
        self._news: News | None = None
        self._own: News | None = None
        self._selector = selectors.DefaultSelector()
        self._lines: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, News] = {}
        # a byte in it wakes the thread, which then sends how this rank ended
        self._wake, self._woken = socket.socketpair()
        self._add(self._woken)
        if rank == 0:
            self._server = self._listen()
        else:
            self._hub = self._connect()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def _listen(self) -> socket.socket:
        self._token = secrets.token_hex(16)
        if _is_loopback():
            server = socket.create_server(("127.0.0.1", 0), backlog=self._world)
        elif socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self._world
            )
        else:
            server = socket.create_server(("", 0), backlog=self._world)
        server.setblocking(False)
        self._add(server)
        self._store.set("hub", f"{server.getsockname()[1]} {self._token} {self._where}")
        return server

    def _connect(self) -> socket.socket:
        port, token, where = self._store.get("hub").decode().split(maxsplit=2)
        host = "127.0.0.1" if _is_loopback() else os.environ["MASTER_ADDR"]
        hub = socket.create_connection((host, int(port)), timeout=_CONNECT)
        hub.settimeout(None)
        _notice_silence(hub)
        hub.sendall(token.encode() + b"\n" + News("done", self._rank, self._where, 0).encode())
        self._add(hub)
        self._ranks[hub] = News("gone", 0, where, PEER_IS_GONE)
        return hub

    def _add(self, connection: socket.socket) -> None:
        _open.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _run(self) -> None:
        while self._news is None:
            for key, _ in self._selector.select():
                connection = cast(socket.socket, key.fileobj)
                if connection is self._woken:
                    self._send_own()
                    return
                if self._rank == 0 and connection is self._server:
                    self._accept()
                else:
                    self._listen_to(connection)
        if self._rank == 0:
            self._tell(self._news)
        self._end(self._news)

    def _accept(self) -> bool:
        """Accept one waiting connection; False if there is none."""
        try:
            connection, _ = self._server.accept()
        except OSError:
            return False
        connection.setblocking(True)
        _notice_silence(connection)
        self._lines[connection] = b""
        self._add(connection)
        return True

    def _listen_to(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, rest = (self._lines.get(connection, b"") + data).split(b"\n")
        self._lines[connection] = rest[:4096]
        for line in lines:
            if self._news is None and connection in self._lines:
                self._take(connection, line)
        if not data and self._news is None and connection in self._lines:
            # closed without a message: its process was killed
            self._drop(connection, self._ranks.get(connection))

    def _take(self, connection: socket.socket, line: bytes) -> None:
        if self._rank == 0 and connection not in self._ranks:
            if line == self._token.encode():
                self._ranks[connection] = News("gone", -1, "", PEER_IS_GONE)
            else:
                self._drop(connection, None)
            return
        try:
            news = News(*json.loads(line))
        except (ValueError, TypeError):
            return
        if self._rank == 0 and self._ranks[connection].rank == -1:
            self._ranks[connection] = News("gone", news.rank, news.where, PEER_IS_GONE)
        elif news.kind == "done":
            self._drop(connection, None)
        else:
            self._drop(connection, news)

    def _drop(self, connection: socket.socket, news: News | None) -> None:
        """Close a connection; ``news`` is None if its rank ended well."""
        # a rank of -1 has not sent its number: it may be a foreign process
        if news is not None and news.rank >= 0:
            self._news = news
        if connection.fileno() >= 0:
            self._selector.unregister(connection)
            connection.close()
            self._lines.pop(connection, None)

    def _tell(self, news: News) -> None:
        # also to connections that have not been accepted yet
        while self._accept():
            pass
        for connection in self._lines:
            with contextlib.suppress(OSError):
                connection.sendall(news.encode())

    def _send_own(self) -> None:
        own = self._own or News("done", self._rank, self._where, 0)
        if self._rank == 0:
            self._tell(own)
        else:
            with contextlib.suppress(OSError):
                self._hub.sendall(own.encode())

    def _end(self, news: News) -> None:
        """Print the line if this rank is to print it, and end the process unless it ends by itself."""
        self._heard.set()
        # if the launcher is gone, all ranks of this node end, and another line says so
        if self._prints_for(news.rank) and not launcher_is_gone():
            line = _line_of(news, self._world)
            if line:
                # in one write, before any later output
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        if self._left.wait(GRACE):
            return
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(news.code)

    def _prints_for(self, gone: int) -> bool:
        """Does this rank print the line? Rank 0 does; if rank 0 is gone, rank 1 and the first rank of each node do."""
        if gone != 0:
            return self._rank == 0
        return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others of an error that leaves the block, before anything is closed."""
        try:
            yield
        except KeyboardInterrupt:
            error = Interrupted()
            self.report(error)
            raise error from None
        except BaseException as error:
            if not follows_from_another(error):
                self.report(error)
            raise

    def report(self, error: BaseException) -> None:
        """Tell the others, once. If several ranks have the same line for the user, the first to report it prints it."""
        if self._own is not None:
            return
        kind, code = "failed", PEER_IS_GONE
        if isinstance(error, RingError):
            kind, code = "error", error.exit_code
            if error.speaks is None:
                error.speaks = _is_first(self._store, str(error), self._rank)
        elif isinstance(error, SystemExit):
            kind, code = "error", error.code if isinstance(error.code, int) else 1
            kind = "done" if error.code in (0, None) else kind
        self._own = News(kind, self._rank, self._where, code)
        self._wake_up()

    def news(self) -> News | None:
        """How another rank ended; waits ``_NEWS`` seconds for it. None if no rank has ended."""
        self._heard.wait(_NEWS)
        return self._news

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"!")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Turn an error that only follows from the end of another rank into an exit with that rank's code."""
        try:
            if error is None:
                return
            if isinstance(error, KeyboardInterrupt):
                error = Interrupted()
                self.report(error)
                raise error from None
            if follows_from_another(error) and (news := self.news()) is not None:
                raise SystemExit(news.code) from None
            self.report(error)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the watch: this rank has ended well, or has reported its error."""
        self._left.set()
        self._wake_up()
        self._thread.join(GRACE)
        for connection in [
            *self._ranks,
            self._wake,
            self._woken,
            *([self._server] if self._rank == 0 else []),
        ]:
            connection.close()
        self._selector.close()


def follows_from_another(error: BaseException) -> bool:
    """Is it a broken connection, which every rank gets when another one has ended?"""
    if isinstance(error, DistError | ConnectionError):
        return True
    return type(error) is RuntimeError and _BROKEN.search(str(error)) is not None


def _line_of(news: News, world_size: int) -> str | None:
    who = f"error: rank {news.rank} of {world_size} ({news.where})"
    if news.kind == "gone":
        return (
            f"{who} is gone: its process ended without a message: killed, or out of memory (see dmesg on that node); "
            "the other ranks stop"
        )
    # for an error the rank has printed its own line
    return (
        f"{who} has failed, for the reason it prints; the other ranks stop" if news.kind == "failed" else None
    )


def _is_first(store: Any, line: str, rank: int) -> bool:
    """Is this the first rank to report ``line``?"""
    try:
        return store.compare_set(f"error/{line}", "", str(rank)).decode() == str(rank)
    except (RuntimeError, ConnectionError):
        # the store is in rank 0, which has failed and printed its line already
        return False


def _is_loopback() -> bool:
    return os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1")


def _notice_silence(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
