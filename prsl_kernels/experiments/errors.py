"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave or must provide is wrong.

    The message names the thing, its value and the remedy. The command line prints it without a traceback and
    exits with status 1; everything else that escapes is a defect of this package and keeps its traceback.
    """
