"""Foreign chat templates, each rendered in a process of its own that may be killed."""

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
from megatron_ring.data.text.chat_template import Text, hear, say
from megatron_ring.errors import DataError

CPU_SECONDS = 10.0
"""Of processor, for all texts of one conversation; seconds of the clock would depend on the neighbours."""
WALL_SECONDS = 300
"""After which a process that does not answer is given up, however busy the machine."""


class TemplateProcess:
    """Renders what :func:`~megatron_ring.data.text.chat_template.render_texts` does, in a process with limits.

    It is started by the first call and ends with this one. Example:
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
            DataError: the template is broken, reaches for what the sandbox forbids, refuses the messages, or takes
                more time or memory than a template may.
        """
        process = self._process = self._process or _start(self._cpu_seconds)
        assert process.stdin is not None and process.stdout is not None
        answer = None
        with contextlib.suppress(BrokenPipeError):
            say(process.stdin, [template, messages, texts, names])
            answer = _answer(process.stdout)
        if answer is None:
            raise failed(self._last_word(process))
        if "error" in answer:
            raise failed(answer["error"])
        return answer["texts"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _last_word(self, process: subprocess.Popen[bytes]) -> str:
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
    """The line about a template that cannot be rendered."""
    return DataError(
        f"chat template failed: {reason}; check the messages' role and content, and the template"
    )


def _start(cpu_seconds: float) -> subprocess.Popen[bytes]:
    # -P: the folder of that file holds modules whose names others may have
    command = [sys.executable, "-P", str(Path(chat_template.__file__)), str(cpu_seconds)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise DataError(
            f"no process can be started for the chat template ({error.strerror}); free some"
        ) from None


def _answer(stream: IO[bytes]) -> Any:
    # not select: a trainer with many open files gives the pipe a number that it cannot take
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return hear(stream) if poll.poll(1000 * WALL_SECONDS) else None
