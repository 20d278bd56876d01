"""Render untrusted chat templates in a separate process that can be killed."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_ring.data.text import chat_template
from megatron_ring.data.text.chat_template import Text, read_message, write_message
from megatron_ring.errors import DataError

CPU_SECONDS = 10.0
"""CPU time for all texts of one conversation; wall time would depend on the load of the machine."""
WALL_SECONDS = 300
"""Wall time after which a process that does not answer is killed."""


class TemplateProcess:
    """Runs :func:`~megatron_ring.data.text.chat_template.render_texts` in a process with limits on memory and time.

    The first call starts the process; it ends with this object. Example:
    ``TemplateProcess().render("{{ messages[0].content }}", messages, [(1, False)], {})``.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        texts: Sequence[Text],
        names: Mapping[str, Any],
    ) -> list[str]:
        """As :func:`~megatron_ring.data.text.chat_template.render_texts`.

        Raises:
            DataError: the template is broken, uses what the sandbox forbids, refuses the messages, or exceeds its time or
                memory.
        """
        process = self._process = self._process or _start(self._cpu_seconds)
        assert process.stdin is not None and process.stdout is not None
        answer = None
        with contextlib.suppress(BrokenPipeError):
            write_message(process.stdin, [template, messages, texts, names])
            answer = _answer(process.stdout)
        if answer is None:
            raise failed(self._exit_reason(process))
        if "error" in answer:
            raise failed(answer["error"])
        return answer["texts"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _exit_reason(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.poll()
        self.close()
        if code is None:
            return f"gave no answer in {WALL_SECONDS} s"
        if code == -signal.SIGVTALRM:
            return f"ran for more than {self._cpu_seconds:g} s"
        return f"ended the process that rendered it (exit code {code})"

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def failed(reason: str) -> DataError:
    """The error for a template that cannot be rendered."""
    return DataError(
        f"chat template failed: {reason}; check the messages' role and content, and the template"
    )


def _start(cpu_seconds: float) -> subprocess.Popen[bytes]:
    # -P: do not put that file's folder, whose module names may shadow others, on the import path
    command = [sys.executable, "-P", str(Path(chat_template.__file__)), str(cpu_seconds)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise DataError(
            f"cannot start a process for the chat template ({error.strerror}); end other processes"
        ) from None


def _answer(stream: IO[bytes]) -> Any:
    # poll instead of select, which cannot handle the file descriptors above 1023 of a trainer with many open files
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return read_message(stream) if poll.poll(1000 * WALL_SECONDS) else None
