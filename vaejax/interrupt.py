"""Ctrl-C while a program is imported, which takes seconds: one line, and exit code 130.

A program imports this before anything else of vaejax. An exception would not do: in a callback of
the garbage collector nobody sees it, and libraries in C++ that define Python classes abort.
"""

import os
import signal
import sys
from types import FrameType

EXIT_CODE = 130  # 128 and the number of SIGINT, as shells have it


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(EXIT_CODE)


def raise_from_now_on() -> None:
    """Let a Ctrl-C be a KeyboardInterrupt again, which clears up what is half done."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imported_by_a_program() -> bool:
    """Tell whether vaejax is imported by a program that was started, and not by a test, a notebook
    or a module of somebody's."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("vaejax", "importlib"):
        frame = frame.f_back
    main = sys.modules["__main__"]
    return frame is not None and frame.f_globals is vars(main) and hasattr(main, "__file__")


if _imported_by_a_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
