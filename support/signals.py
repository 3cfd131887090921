"""Imported by the commands before torch, which takes seconds: Ctrl-C and SIGTERM in that time end
in one line too. From then on `machine.run` has them. Of a test or a program that imports a command,
nothing is changed.
"""
import os
import signal
import sys


def leave(number, frame):
    """End at once, in one line, with the signal's exit code."""
    os.write(2, b"stopped\n")
    os._exit(128 + number)


started = getattr(sys.modules["__main__"], "__file__", None) or ""
root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.dirname(os.path.realpath(started)) == root:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
